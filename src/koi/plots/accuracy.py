"""Few-shot accuracy over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from koi.plots.style import HUES, new_figure

_WAYS = ("transductive", "inductive")


def accuracy_curve(
    validations: Sequence[Mapping[str, float]], results: Mapping[int, Mapping[str, Any]]
) -> Figure:
    """Draw accuracy against meta-iterations, both ways to measure, a panel for each shot count.

    Args:
        validations: for points of the training ``"iteration"`` and accuracies in [0, 1] named
            such as ``"1-shot inductive"``, on validation classes.
        results: number of shots -> what `koi.runs.measure` found on test classes.

    >>> figure = accuracy_curve([{"iteration": 300, "1-shot inductive": 0.8}], {})
    >>> [axes.get_title() for axes in figure.axes]
    ['1-shot']
    """
    named = {int(name.split("-")[0]) for line in validations for name in line if "-shot" in name}
    shots = sorted({*named, *results})
    figure = new_figure(4.6 * len(shots), 3.4)
    panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
    for axes, num_shots in zip(panels, shots, strict=True):
        for way, hue in zip(_WAYS, HUES, strict=True):
            _draw_validations(axes, validations, f"{num_shots}-shot {way}", hue)
            if num_shots in results:
                _draw_result(axes, results[num_shots], way, hue)
        axes.set(title=f"{num_shots}-shot", xlabel="meta-iterations")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_validations(
    axes: Axes, validations: Sequence[Mapping[str, float]], name: str, hue: str
) -> None:
    lines = [line for line in validations if name in line]
    iterations = [line["iteration"] for line in lines]
    axes.plot(iterations, [100 * line[name] for line in lines], color=hue, marker=".")


def _draw_result(axes: Axes, result: Mapping[str, Any], way: str, hue: str) -> None:
    mean, half = (100 * value for value in result[way])
    axes.errorbar(result["iteration"], mean, half, color=hue, marker="D", capsize=3)


def _legend() -> list[Line2D]:
    curves = [
        Line2D([], [], color=hue, marker=".", label=f"{way}, validation classes")
        for way, hue in zip(_WAYS, HUES, strict=True)
    ]
    test = Line2D([], [], color="0.3", marker="D", linestyle="", label="test classes, 95 %")
    return [*curves, test]
