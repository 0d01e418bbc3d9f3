"""The picture of the sine waves: what one wave's network makes of it, and the error over many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from koi import allowed
from koi.errors import ConfigurationError
from koi.evaluation import Evaluation, counted, doubling
from koi.plots.style import HUES, draw_curve, new_figure

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

    Raises:
        ConfigurationError: they are something else, or differ in length.
    """

    inputs: Tensor
    truth: Tensor
    seen_inputs: Tensor
    seen_targets: Tensor
    predictions: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        sets = ("inputs", "truth", "seen_inputs", "seen_targets")
        allowed.check(
            **{name: (getattr(self, name), _numbers) for name in sets},
            predictions=(self.predictions, _predictions),
        )
        drawn = [self.truth, *self.predictions.values()]
        if len(self.seen_inputs) != len(self.seen_targets) or any(
            len(values) != len(self.inputs) for values in drawn
        ):
            raise ConfigurationError(["a wave needs one value for each of its inputs"])


def sine_figure(waves: Mapping[str, Wave], curves: Mapping[str, Evaluation]) -> Figure:
    """Draw one wave for each initialisation, as in the paper's figure 1, and all their curves.

    Args:
        waves: title -> the wave as a network that starts there learns it.
        curves: the same titles -> the error over many waves.

    Raises:
        ConfigurationError: they are something else, or their titles differ.
    """
    allowed.check(
        waves=(waves, allowed.named(allowed.instance(Wave, "a Wave"))),
        curves=(curves, allowed.named(allowed.instance(Evaluation, "a koi.Evaluation"))),
    )
    if not waves or waves.keys() != curves.keys():
        raise ConfigurationError(["waves and curves must have the same titles, at least one"])
    figure = new_figure(9.6, 3.2)
    *panels, last = figure.subplots(1, len(waves) + 1)
    top = 1.1 * max(_reach(wave) for wave in waves.values())
    for axes, (title, wave), hue in zip(panels, waves.items(), HUES, strict=False):
        _draw_wave(axes, wave, hue)
        axes.set(xlabel="x", ylabel="f(x)", ylim=(-top, top))
        axes.set_title(title, color=hue)
    for (title, curve), hue in zip(curves.items(), HUES, strict=False):
        draw_curve(last, title, curve, hue)
    _label_curves(last, next(iter(curves.values())))
    for axes in (*panels, last):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=_line_styles(waves), loc="outside lower center", ncols=9, frameon=False)
    return figure


def _draw_wave(axes: Axes, wave: Wave, hue: str) -> None:
    axes.plot(wave.inputs, wave.truth, **_TRUTH)
    for prediction, dashes in zip(wave.predictions.values(), _DASHES, strict=True):
        axes.plot(wave.inputs, prediction, color=hue, linestyle=dashes, linewidth=1.8)
    axes.plot(wave.seen_inputs, wave.seen_targets, **_POINTS)


def _label_curves(axes: Axes, curve: Evaluation) -> None:
    axes.set_title(f"error on {counted(curve.num_tasks, curve.num_skipped, 'new waves')}")
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


_numbers = allowed.that(
    lambda value: (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and (value.dim() > 0 and 0 < value.numel() == len(value))
    ),
    "a tensor of floating-point numbers, shape (points,) or (points, 1)",
)


def _predictions(value: Any) -> Any:
    """Take a dictionary of three numbers of steps and what is predicted after them."""
    if isinstance(value, Mapping) and [type(steps) for steps in value] == [int] * len(_DASHES):
        return {steps: _numbers(values) for steps, values in value.items()}
    raise allowed.Refused(f"a dictionary of {len(_DASHES)} numbers of steps -> predictions")


def _reach(wave: Wave) -> float:
    return max(values.abs().max().item() for values in (wave.truth, *wave.predictions.values()))
