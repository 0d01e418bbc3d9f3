"""What the pictures have in common: size, colours, and a curve with its interval."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koi.evaluation import Evaluation

# The kinds of file that a picture can be written as.
SUFFIXES = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which colour-blind readers tell apart; the first two differ most.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches of 150 dots."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, path: Path | str) -> None:
    """Write ``figure`` to a file of one of the kinds in `SUFFIXES`."""
    figure.savefig(path)


def draw_curve(axes: Axes, title: str, curve: Evaluation, hue: str) -> None:
    """Draw the mean query loss over inner steps, in its 95 % interval."""
    steps = range(curve.num_steps + 1)
    low = [mean - half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    high = [mean + half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    axes.fill_between(steps, low, high, color=hue, alpha=0.25, linewidth=0)
    axes.plot(steps, curve.mean, color=hue, linewidth=1.8, label=title)
