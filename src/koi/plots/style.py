"""What the pictures have in common: size, colours, and a curve with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koi import allowed
from koi.evaluation import Evaluation

# The kinds of file that a picture can be written as.
SUFFIXES = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which colour-blind readers tell apart; the first two differ most.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches of 150 dots."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, path: Path | str) -> None:
    """Write ``figure`` to a file of one of the kinds in `SUFFIXES`.

    Raises:
        ConfigurationError: it is no figure, or the path of another kind of file.
        OSError: the file cannot be written.
    """
    allowed.check(figure=(figure, allowed.instance(Figure, "a figure")), path=(path, _of_a_kind))
    figure.savefig(path)


def _of_a_kind(value: Any) -> Any:
    """Take the path of a picture."""
    if Path(allowed.path(value)).suffix.lower() in SUFFIXES:
        return value
    raise allowed.Refused(f"a path that ends in one of {', '.join(SUFFIXES)}")


def draw_curve(axes: Axes, title: str, curve: Evaluation, hue: str) -> None:
    """Draw the mean query loss over inner steps, in its 95 % interval."""
    steps = range(curve.num_steps + 1)
    low = [mean - half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    high = [mean + half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    axes.fill_between(steps, low, high, color=hue, alpha=0.25, linewidth=0)
    axes.plot(steps, curve.mean, color=hue, linewidth=1.8, label=title)
