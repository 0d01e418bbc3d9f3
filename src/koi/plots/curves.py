"""Curves of a training, and of adaptation to new tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from koi import allowed
from koi.errors import ConfigurationError
from koi.evaluation import Evaluation, counted
from koi.plots.style import HUES, draw_curve, new_figure
from koi.records import Record

# More meta-iterations than this are drawn as means of neighbours.
_MOST_POINTS = 50
# Losses that fall by more than this factor are drawn on a logarithmic axis.
_WIDE = 20.0


def loss_curve(history: Sequence[Record]) -> Figure:
    """Draw the loss at φ and the last loss of the inner loop, over meta-iterations.

    Each point is the mean of so many meta-iterations that at most 50 points are drawn.

    Args:
        history: the records of a training, ``koi.history``.

    Raises:
        ConfigurationError: there are none, or they are something else.

    >>> figure = loss_curve([Record(i, 1.0, 0.5, 0.1, 1.0, 0.01) for i in range(1000)])
    >>> [len(line.get_xdata()) for line in figure.axes[0].lines]
    [50, 50]
    """
    record = allowed.instance(Record, "a koi.Record")
    allowed.check(history=(history, allowed.each(record, "koi.Record")))
    if not history:
        raise ConfigurationError(["there is no record to draw: train first, history is empty"])
    figure = new_figure(5.6, 3.2)
    axes = figure.add_subplot()
    size = math.ceil(len(history) / _MOST_POINTS)
    blocks = [history[start : start + size] for start in range(0, len(history), size)]
    middles = [(block[0].iteration + block[-1].iteration) / 2 for block in blocks]
    before = [_mean([record.loss_before for record in block]) for block in blocks]
    after = [_mean([record.loss_after for record in block]) for block in blocks]
    axes.plot(middles, before, color=HUES[1], linewidth=1.4, label="at φ, before adaptation")
    axes.plot(middles, after, color=HUES[0], linewidth=1.4, label="at the end of the inner loop")
    _finish(axes, before + after)
    means = f", means of {size}" if size > 1 else ""
    axes.set(xlabel=f"meta-iteration{means}", ylabel="loss on training tasks")
    axes.legend(frameon=False)
    return figure


def adaptation_curves(curves: Mapping[str, Evaluation], ylabel: str = "query loss") -> Figure:
    """Draw the mean query loss over inner steps, with 95 % intervals, a curve for each title.

    Args:
        curves: title -> what `koi.Koi.evaluate` returned.
        ylabel: what the loss is called.

    Raises:
        ConfigurationError: they are something else.

    >>> import torch
    >>> curve = Evaluation(torch.tensor([[4.0, 1.0], [2.0, 1.0]]))
    >>> figure = adaptation_curves({"learned": curve})
    >>> figure.axes[0].get_xlabel()
    'inner steps (mean over 2 tasks)'
    """
    allowed.check(
        curves=(curves, allowed.named(allowed.instance(Evaluation, "a koi.Evaluation"))),
        ylabel=(ylabel, allowed.text),
    )
    figure = new_figure(5.6, 3.2)
    axes = figure.add_subplot()
    for (title, curve), hue in zip(curves.items(), cycle(HUES), strict=False):
        draw_curve(axes, title, curve, hue)
    _finish(axes, [value for curve in curves.values() for value in curve.mean])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    counts = sorted({(curve.num_tasks, curve.num_skipped) for curve in curves.values()})
    tasks = " or ".join(counted(*count) for count in counts)
    axes.set(xlabel=f"inner steps (mean over {tasks})", ylabel=ylabel)
    axes.legend(frameon=False)
    return figure


def _finish(axes: Axes, values: Sequence[float]) -> None:
    drawn = [value for value in values if math.isfinite(value)]
    if drawn and min(drawn) > 0 and max(drawn) > _WIDE * min(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    elif drawn and min(drawn) >= 0:
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of those that are numbers: of a skipped meta-batch the loss is NaN."""
    given = [value for value in values if not math.isnan(value)]
    return sum(given) / len(given) if given else math.nan
