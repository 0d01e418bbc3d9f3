"""The pictures that experiments leave behind.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

from koi.plots.accuracy import accuracy_curve
from koi.plots.curves import adaptation_curves, learning_curve
from koi.plots.episodes import episode_grid
from koi.plots.sines import Wave, sine_figure
from koi.plots.style import SUFFIXES, save

__all__ = [
    "SUFFIXES",
    "Wave",
    "accuracy_curve",
    "adaptation_curves",
    "episode_grid",
    "learning_curve",
    "save",
    "sine_figure",
]
