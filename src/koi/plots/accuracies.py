"""Few-shot accuracy over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from koi.plots.style import HUES, new_figure


def learning_curve(
    validations: Sequence[Mapping[str, float]], results: Mapping[int, Mapping[str, Any]]
) -> Figure:
    """Draw accuracy against meta-iterations, both ways to measure, a panel for each shot count.

    Args:
        validations: for points of the training ``"iteration"`` and accuracies in [0, 1] named
            such as ``"1-shot inductive"``, on validation classes.
        results: number of shots -> what `koi.lab.runs.measure` found on test classes.
    """
    shots = sorted({int(n.split("-")[0]) for line in validations for n in line if "-shot" in n})
    shots = sorted({*shots, *results})
    figure = new_figure(4.6 * max(1, len(shots)), 3.4)
    panels = figure.subplots(1, max(1, len(shots)), sharey=True, squeeze=False)[0]
    for axes, num_shots in zip(panels, shots, strict=False):
        for way, hue in zip(("transductive", "inductive"), HUES[:2], strict=True):
            name = f"{num_shots}-shot {way}"
            points = [(line["iteration"], 100 * line[name]) for line in validations if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=hue, marker=".", label=way)
            if num_shots in results:
                _draw_result(axes, results[num_shots], way, hue)
        axes.set_title(f"{num_shots}-shot")
        axes.set_xlabel("meta-iterations")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(
        handles=[
            *(
                Line2D([], [], color=hue, marker=".", label=f"{way}, validation classes")
                for way, hue in zip(("transductive", "inductive"), HUES[:2], strict=True)
            ),
            Line2D([], [], color="0.3", marker="D", linestyle="", label="test classes, 95 %"),
        ],
        frameon=False,
    )
    return figure


def _draw_result(axes: Axes, result: Mapping[str, Any], way: str, hue: str) -> None:
    mean, half = (100 * value for value in result[way])
    axes.errorbar(result["iteration"], mean, half, color=hue, marker="D", capsize=3)
