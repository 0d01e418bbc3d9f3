"""The pictures that experiments leave behind.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from koi.evaluation import Evaluation, doubling

# The kinds of file that a picture can be written as.
SUFFIXES = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which colour-blind readers tell apart; they differ in lightness too.
_HUES = ("#0072B2", "#D55E00")
# The further a network has adapted, the fuller its line.
_DASHES: tuple[Any, ...] = (":", (0, (5, 2)), "-")
_TRUTH: dict[str, Any] = {"color": "0.8", "linewidth": 4.5}
_POINTS: dict[str, Any] = {"color": "black", "linestyle": "", "marker": "o", "markersize": 4.5}


@dataclass(frozen=True)
class Wave:
    """One wave and what a network makes of it.

    Args:
        inputs: shape (points,), ascending.
        truth: the wave there.
        seen_inputs: the points that the network adapts to.
        seen_targets: the wave at those.
        predictions: number of inner steps -> the network's output at ``inputs`` after them.
    """

    inputs: Tensor
    truth: Tensor
    seen_inputs: Tensor
    seen_targets: Tensor
    predictions: Mapping[int, Tensor]


def sine_figure(waves: Mapping[str, Wave], curves: Mapping[str, Evaluation]) -> Figure:
    """Draw one wave for each initialisation, as in the paper's figure 1, and all their curves.

    Args:
        waves: title -> the wave as a network that starts there learns it.
        curves: the same titles -> the error over many waves.
    """
    figure = Figure(figsize=(9.6, 3.2), dpi=150, layout="constrained")
    *panels, last = figure.subplots(1, len(waves) + 1)
    top = 1.1 * max(_reach(wave) for wave in waves.values())
    for axes, (title, wave), hue in zip(panels, waves.items(), _HUES, strict=True):
        _draw_wave(axes, wave, hue)
        axes.set(xlabel="x", ylabel="f(x)", ylim=(-top, top))
        axes.set_title(title, color=hue)
    for (title, curve), hue in zip(curves.items(), _HUES, strict=True):
        _draw_curve(last, title, curve, hue)
    _label_curves(last, next(iter(curves.values())))
    for axes in (*panels, last):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=_line_styles(waves), loc="outside lower center", ncols=9, frameon=False)
    return figure


def learning_curve(
    validations: Sequence[Mapping[str, float]], results: Mapping[int, Mapping[str, Any]]
) -> Figure:
    """Draw accuracy against meta-iterations, both ways to measure, a panel for each shot count.

    Args:
        validations: for points of the training ``"iteration"`` and accuracies in [0, 1] named
            such as ``"1-shot inductive"``, on validation classes.
        results: number of shots -> what `koi.runs.measure` found on test classes.
    """
    shots = sorted({int(n.split("-")[0]) for line in validations for n in line if "-shot" in n})
    shots = sorted({*shots, *results})
    figure = Figure(figsize=(4.6 * max(1, len(shots)), 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, max(1, len(shots)), sharey=True, squeeze=False)[0]
    for axes, num_shots in zip(panels, shots, strict=False):
        for way, hue in zip(("transductive", "inductive"), _HUES, strict=True):
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
                for way, hue in zip(("transductive", "inductive"), _HUES, strict=True)
            ),
            Line2D([], [], color="0.3", marker="D", linestyle="", label="test classes, 95 %"),
        ],
        frameon=False,
    )
    return figure


def _draw_result(axes: Axes, result: Mapping[str, Any], way: str, hue: str) -> None:
    mean, half = (100 * value for value in result[way])
    axes.errorbar(result["iteration"], mean, half, color=hue, marker="D", capsize=3)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to a file of one of the kinds in `SUFFIXES`."""
    figure.savefig(path)


def _draw_wave(axes: Axes, wave: Wave, hue: str) -> None:
    axes.plot(wave.inputs, wave.truth, **_TRUTH)
    for prediction, dashes in zip(wave.predictions.values(), _DASHES, strict=True):
        axes.plot(wave.inputs, prediction, color=hue, linestyle=dashes, linewidth=1.8)
    axes.plot(wave.seen_inputs, wave.seen_targets, **_POINTS)


def _draw_curve(axes: Axes, title: str, curve: Evaluation, hue: str) -> None:
    steps = range(curve.num_steps + 1)
    low = [mean - half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    high = [mean + half for mean, half in zip(curve.mean, curve.interval, strict=True)]
    axes.fill_between(steps, low, high, color=hue, alpha=0.25, linewidth=0)
    axes.plot(steps, curve.mean, color=hue, linewidth=1.8, label=title)


def _label_curves(axes: Axes, curve: Evaluation) -> None:
    axes.set_title(f"error on {curve.num_tasks} new waves")
    axes.set(xlabel="gradient steps on 10 points", ylabel="mean squared error", yscale="log")
    axes.set_xticks([step for step in doubling(curve.num_steps) if step == 0 or step >= 4])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)


def _line_styles(waves: Mapping[str, Wave]) -> list[Line2D]:
    """Return what the panels' legend shows: line styles, in the colour of neither panel."""
    steps = next(iter(waves.values())).predictions
    names = [f"after {k} step{'s' * (k > 1)}" if k else "before" for k in steps]
    lines = [
        Line2D([], [], color="0.3", linestyle=dashes, linewidth=1.8, label=name)
        for name, dashes in zip(names, _DASHES, strict=True)
    ]
    points = Line2D([], [], label="points seen", **_POINTS)
    return [Line2D([], [], label="truth", **_TRUTH), points, *lines]


def _reach(wave: Wave) -> float:
    return max(values.abs().max().item() for values in (wave.truth, *wave.predictions.values()))
