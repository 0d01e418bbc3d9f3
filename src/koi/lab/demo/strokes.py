"""From strokes on a pad to the form of Omniglot's images, the only one that the network knows.

Omniglot's drawings lie in a box of 105 × 105 pixels, are one bit deep, and were made small by
taking the nearest of them. The constants are medians and means over the 19,280 drawings of the
background set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Point = tuple[float, float]
Drawing = Sequence[Sequence[Point]]

IMAGE_SIZE = 28
PAPER, INK = 1.0, 0.0  # as in Omniglot's files, where white is 1

_BOX = 105
_EXTENT = 68.0  # the longer side of a drawing, its pen included
_MIDDLE = 51.0  # where the middle of its bounding box lies, in both directions
_PEN_RADIUS = 2.6
# A dot is not a small circle: from this size down, in parts of the pad, drawings stay small.
_SMALLEST_SCALED = 0.2


def image(drawing: Drawing) -> Tensor:
    """Return a drawing as an image of Omniglot's form, shape (1, 28, 28), of `INK` on `PAPER`.

    The drawing is centred and brought to the usual extent, proportions kept. A pixel is ink where
    the pixel of the 105 × 105 box that is nearest to it lies within the pen's radius of a stroke.

    Args:
        drawing: strokes, each a sequence of at least one point (x, y), in parts of the pad: x from
            left to right, y from top to bottom. All coordinates are finite.

    >>> cross = [[(0.1, 0.5), (0.9, 0.5)], [(0.5, 0.1), (0.5, 0.9)]]
    >>> image(cross).shape, int((image(cross) == INK).sum())
    (torch.Size([1, 28, 28]), 35)
    """
    starts, ends = _in_box(*_segments(drawing))
    pixel = (torch.arange(IMAGE_SIZE) + 0.5) * (_BOX / IMAGE_SIZE)
    nearest = pixel.floor() + 0.5
    places = torch.cartesian_prod(nearest, nearest).flip(1)  # (x, y) row by row
    is_ink = _distance(places, starts, ends) <= _PEN_RADIUS
    return torch.where(is_ink, INK, PAPER).reshape(1, IMAGE_SIZE, IMAGE_SIZE)


def _segments(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Return where the lines of all strokes start and end, each of shape (lines, 2).

    A point on its own, a tap, is a line of length zero.
    """
    strokes = [torch.tensor(stroke, dtype=torch.float32) for stroke in drawing]
    pairs = [(s[:-1], s[1:]) if len(s) > 1 else (s, s) for s in strokes]
    return torch.cat([start for start, _ in pairs]), torch.cat([end for _, end in pairs])


def _in_box(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lines in pixels of the box, centred and of the usual extent."""
    points = torch.cat([starts, ends])
    low, high = points.amin(dim=0), points.amax(dim=0)
    size = (high - low).max().clamp(min=_SMALLEST_SCALED)
    scale = (_EXTENT - 2 * _PEN_RADIUS) / size
    middle = (low + high) / 2
    return (starts - middle) * scale + _MIDDLE, (ends - middle) * scale + _MIDDLE


def _distance(places: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Return how far each of ``places``, shape (places, 2), is from the nearest line."""
    along = ends - starts
    length = along.square().sum(dim=1).clamp(min=1e-12)
    # where on the line, from 0 to 1, the nearest point lies; all of shape (places, lines)
    part = (places @ along.T - (starts * along).sum(dim=1)) / length
    part = part.clamp(0, 1)
    x = places[:, :1] - starts[:, 0] - part * along[:, 0]
    y = places[:, 1:] - starts[:, 1] - part * along[:, 1]
    return (x.square() + y.square()).amin(dim=1).sqrt()
