"""Few-shot accuracy over a training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from koi import allowed
from koi.plots.style import HUES, new_figure

_NAME = re.compile(r"iteration|\d{1,9}-shot \w+")


def learning_curve(
    validations: Sequence[Mapping[str, float]], results: Mapping[int, Mapping[str, Any]]
) -> Figure:
    """Draw accuracy against meta-iterations, both ways to measure, a panel for each shot count.

    Args:
        validations: for points of the training ``"iteration"`` and accuracies in [0, 1] named
            such as ``"1-shot inductive"``, on validation classes.
        results: number of shots -> what `koi.lab.runs.measure` found on test classes.

    Raises:
        ConfigurationError: they are something else.
    """
    allowed.check(
        validations=(validations, allowed.each(_line, "measurements")),
        results=(results, _results),
    )
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)  # a point alone would stand among numbers that are next to its own
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


_line = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and _is_number(value.get("iteration"))
        and all(
            isinstance(name, str) and _is_number(number) and _NAME.fullmatch(name)
            for name, number in value.items()
        )
    ),
    'a dictionary with "iteration", numbers, and names such as "1-shot inductive"',
)


_results = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and all(type(shots) is int and _is_result(result) for shots, result in value.items())
    ),
    'a dictionary of numbers of shots -> "transductive" and "inductive", both a mean and an '
    'interval, and "iteration"',
)


def _is_result(result: Any) -> bool:
    if not isinstance(result, Mapping) or not _is_number(result.get("iteration")):
        return False
    pairs = (result.get("transductive"), result.get("inductive"))
    return all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair))
        for pair in pairs
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _draw_result(axes: Axes, result: Mapping[str, Any], way: str, hue: str) -> None:
    mean, half = (100 * value for value in result[way])
    axes.errorbar(result["iteration"], mean, half, color=hue, marker="D", capsize=3)
