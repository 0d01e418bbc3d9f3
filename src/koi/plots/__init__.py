"""The pictures that experiments leave behind.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

from koi.plots.accuracies import learning_curve
from koi.plots.curves import adaptation_curves, loss_curve
from koi.plots.episodes import episode_grid
from koi.plots.sines import Wave, sine_figure
from koi.plots.style import SUFFIXES, save

__all__ = [
    "SUFFIXES",
    "Wave",
    "adaptation_curves",
    "episode_grid",
    "learning_curve",
    "loss_curve",
    "save",
    "sine_figure",
]
