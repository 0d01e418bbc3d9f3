"""One few-shot episode: what was shown, what was asked, what was answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from koi import allowed
from koi.errors import ConfigurationError
from koi.plots.style import HUES, new_figure

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MOST = 5  # examples and queries of each class that are drawn
_CELL = 0.85  # inches of a picture's side
_LETTER = 0.085  # inches of a letter
_LONGEST = 14  # letters of a name that are written
_RIGHT, _WRONG = HUES[0], HUES[1]


def episode_grid(
    support_inputs: Tensor,
    support_targets: Tensor,
    query_inputs: Tensor,
    query_targets: Tensor,
    scores: Tensor,
    names: Sequence[str] | None = None,
) -> Figure:
    """Draw an episode: a row for each class, its support images, then its queries as classified.

    A query's frame is full and blue where the answer is right, dashed and orange where it is
    wrong; below stand the class that was chosen and its probability, the softmax of the scores.

    Args:
        support_inputs: images, shape (num_support, channels, height, width), one channel or three.
        support_targets: their classes 0 … num_ways − 1, shape (num_support,).
        query_inputs: images, shape (num_query, channels, height, width).
        query_targets: their classes, shape (num_query,).
        scores: what the adapted model gives for the queries, shape (num_query, num_ways).
        names: of the classes; None: A, B, C …

    Raises:
        ConfigurationError: they are something else, or do not fit together.

    >>> import torch
    >>> images, classes = torch.rand(3, 1, 8, 8), torch.arange(3)
    >>> figure = episode_grid(images, classes, images, classes, torch.eye(3))
    >>> [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    ['A  58 %', 'B  58 %', 'C  58 %']
    """
    allowed.check(
        support_inputs=(support_inputs, _images),
        support_targets=(support_targets, _classes),
        query_inputs=(query_inputs, _images),
        query_targets=(query_targets, _classes),
        scores=(scores, _scores),
        names=(names, allowed.optional(allowed.each(allowed.text, "names"))),
    )
    num_ways = scores.shape[1]
    _check_together(support_inputs, support_targets, num_ways)
    _check_together(query_inputs, query_targets, num_ways)
    if len(scores) != len(query_inputs) or (names is not None and len(names) != num_ways):
        raise ConfigurationError(
            [
                f"scores of shape {tuple(scores.shape)}: must have a row for each query, and a "
                "column for each class, of which each has one of the names"
            ]
        )
    names = [_short(name) for name in names or map(_letter, range(num_ways))]
    probabilities = scores.detach().softmax(1).cpu()
    supports = [_first(support_targets, number) for number in range(num_ways)]
    queries = [_first(query_targets, number) for number in range(num_ways)]
    left, right = max(map(len, supports)), max(map(len, queries))
    longest = max(map(len, names))
    width = max(_CELL, _LETTER * (longest + 6))  # a query's caption: the name and "100 %"
    figure = new_figure(
        width * (left + right + 0.5) + _LETTER * longest, (_CELL + 0.2) * num_ways + 0.3
    )
    grid: Any = figure.subplots(
        num_ways, left + right + 1, squeeze=False, width_ratios=[1] * left + [0.15] + [1] * right
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for number, row in enumerate(grid):
        for axes, index in zip(row[:left], supports[number], strict=False):
            _draw(axes, support_inputs[index], "0.8")
        for axes, index in zip(row[left + 1 :], queries[number], strict=False):
            chosen = int(probabilities[index].argmax())
            correct = chosen == number
            _draw(axes, query_inputs[index], _RIGHT if correct else _WRONG, 2.0, not correct)
            axes.set_xlabel(
                f"{names[chosen]}  {probabilities[index, chosen]:.0%}".replace("%", " %")
            )
        row[0].set_ylabel(names[number], rotation=0, ha="right", va="center", labelpad=8)
    grid[0, 0].set_title("shown", loc="left", fontsize="medium")
    grid[0, left + 1].set_title("answered", loc="left", fontsize="medium")
    return figure


_images = allowed.that(
    lambda value: (
        isinstance(value, Tensor)
        and (value.dim() == 4 and value.shape[1] in (1, 3))
        and (value.numel() > 0 and not value.is_complex())
    ),
    "images, shape (examples, 1 or 3, height, width)",
)


_classes = allowed.that(
    lambda value: isinstance(value, Tensor) and value.dim() == 1 and value.dtype in _WHOLE,
    "numbers of classes, shape (examples,)",
)


_scores = allowed.that(
    lambda value: (
        isinstance(value, Tensor)
        and (value.dim() == 2 and value.numel() > 0 and value.dtype.is_floating_point)
    ),
    "scores, shape (queries, ways)",
)


def _check_together(inputs: Tensor, targets: Tensor, num_ways: int) -> None:
    if len(inputs) != len(targets) or bool(((targets < 0) | (targets >= num_ways)).any()):
        raise ConfigurationError(
            [
                f"{len(inputs)} images of the classes {targets.tolist()[:9]}: must be one for each "
                f"image, from 0 to {num_ways - 1}"
            ]
        )


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _first(targets: Tensor, number: int) -> list[int]:
    """Return where the first few examples of a class are."""
    return [int(index) for index in (targets == number).nonzero().flatten()[:_MOST]]


def _draw(axes: Axes, image: Tensor, frame: str, width: float = 0.8, dashed: bool = False) -> None:
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    pixels = image.detach().float().cpu().movedim(0, -1)
    low, high = pixels.min(), pixels.max()
    shades = (pixels - low) / (high - low).clamp(min=1e-12)
    axes.imshow(shades.numpy(), vmin=0, vmax=1, cmap="gray")  # colours have no use for the map
    axes.spines[:].set(color=frame, linewidth=width, linestyle="--" if dashed else "-")
    axes.xaxis.label.set_fontsize("small")
