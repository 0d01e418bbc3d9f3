"""Strokes become images of the form that the network was trained on."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from koi.lab.demo.strokes import _MIDDLE, _PEN_RADIUS, INK, PAPER, image
from koi.problems import omniglot

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot"

CROSS = [[(0.25, 0.5), (0.75, 0.5)], [(0.5, 0.25), (0.5, 0.75)]]
ZIGZAG = [[(0.1, 0.2), (0.9, 0.3), (0.2, 0.8), (0.8, 0.9)]]
RING = [[(0.5 + 0.3 * math.cos(t / 9), 0.5 + 0.3 * math.sin(t / 9)) for t in range(57)]]


def ink(drawing):
    """Where the ink is, (row, column) by row."""
    return (image(drawing)[0] == INK).nonzero().tolist()


def drawn_slowly(drawing):
    """The box of 105 × 105 pixels, each looked at by itself, made small by Pillow."""
    points = [point for stroke in drawing for point in stroke]
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    scale = (68 - 2 * 2.6) / max(high - low)
    box = np.ones((105, 105), dtype=bool)
    ys, xs = np.mgrid[:105, :105] + 0.5
    for stroke in drawing:
        corners = [(np.array(point) - (low + high) / 2) * scale + 51 for point in stroke]
        for start, end in itertools.pairwise(corners):
            for part in np.linspace(0, 1, 3000):
                x, y = start + part * (end - start)
                box &= (xs - x) ** 2 + (ys - y) ** 2 > 2.6**2
    small = Image.fromarray(box).convert("1").resize((28, 28))
    return torch.from_numpy(np.array(small)).float().unsqueeze(0)


@pytest.mark.parametrize("drawing", [CROSS, ZIGZAG])
def test_the_same_as_a_large_drawing_made_small_by_pillow(drawing):
    fast, slow = image(drawing), drawn_slowly(drawing)
    assert fast.shape == (1, 28, 28)
    assert fast.dtype == torch.float32
    # a pixel whose middle lies on the edge of a line may fall on either side of it
    assert (fast != slow).sum() <= 2
    assert 30 < (fast == INK).sum() < 200


def test_where_a_line_lies_and_how_wide_it_is():
    """A vertical line: 3.75 pixels of the box to a pixel, of which the pen covers 5.2."""
    rows, columns = zip(*ink([[(0.5, 0.1), (0.5, 0.9)]]), strict=True)
    middles = [math.floor(3.75 * (i + 0.5)) + 0.5 for i in range(28)]
    assert set(columns) == {i for i, at in enumerate(middles) if abs(at - 51) <= 2.6}
    assert set(rows) == {i for i, at in enumerate(middles) if abs(at - 51) <= 34}


@pytest.mark.parametrize(("scale", "x", "y"), [(1, 0.125, -0.25), (0.5, 0.25, 0.5), (1.5, 0, 0)])
def test_place_and_size_on_the_pad_do_not_matter(scale, x, y):
    moved = [[(scale * a + x, scale * b + y) for a, b in stroke] for stroke in CROSS]
    assert torch.equal(image(moved), image(CROSS))


def test_neither_order_nor_direction_of_strokes_matters():
    reversed_ = [list(reversed(stroke)) for stroke in reversed(CROSS)]
    assert torch.equal(image(reversed_), image(CROSS))


def test_right_is_right_and_down_is_down():
    rows, columns = zip(*ink([[(0.1, 0.1), (0.9, 0.1), (0.9, 0.9)]]), strict=True)
    at_top = [c for r, c in zip(rows, columns, strict=True) if r == min(rows)]
    at_right = [r for r, c in zip(rows, columns, strict=True) if c == max(columns)]
    assert len(at_top) > 10
    assert len(at_right) > 10
    assert (max(rows), min(columns)) not in set(zip(rows, columns, strict=True))


@pytest.mark.parametrize("drawing", [[[(0.3, 0.3)]], [[(0.3, 0.3), (0.3, 0.3)]]])
def test_a_tap_is_a_dot(drawing):
    assert 1 <= len(ink(drawing)) <= 4


def test_what_is_tiny_stays_small():
    rows, _ = zip(*ink([[(0.5, 0.5), (0.5, 0.52)]]), strict=True)
    assert max(rows) - min(rows) < 5


@pytest.fixture(scope="module")
def real():
    """Drawings of one of Omniglot's small archives, shape (drawings, 105, 105)."""
    if not OMNIGLOT.is_dir():
        pytest.skip("needs Omniglot in ../shared/data/omniglot")
    data = omniglot.characters(OMNIGLOT / "images_background_small1.zip", image_size=105)
    which = torch.arange(0, len(data), 3).unsqueeze(1)
    return data.take(*torch.broadcast_tensors(which, torch.arange(20))).flatten(0, 2)


def test_ink_and_paper_are_omniglots(real):
    assert set(real.unique().tolist()) == {INK, PAPER}
    assert (real == PAPER).float().mean() > 0.8


def test_extent_middle_and_pen_are_omniglots(real):
    is_ink = real == INK
    edges = []
    for axis in (1, 2):
        line = is_ink.any(dim=axis).int()
        edges += [line.argmax(dim=1).float(), 105 - line.flip(1).argmax(dim=1).float()]
    left, right, top, bottom = edges
    longer = torch.maximum(right - left, bottom - top)
    rows, _ = zip(*ink([[(0.5, 0.1), (0.5, 0.9)]]), strict=True)
    ours = 3.75 * (max(rows) - min(rows) + 1)
    assert abs(longer.median().item() - ours) < 4
    assert abs(((left + right) / 2).mean().item() - _MIDDLE) < 1.5
    assert abs(((top + bottom) / 2).mean().item() - _MIDDLE) < 1.5
    # the commonest width of a line is that of an upright one
    changes = torch.nn.functional.pad(is_ink.int(), (1, 1)).diff(dim=2)
    runs = (changes == -1).nonzero()[:, 2] - (changes == 1).nonzero()[:, 2]
    assert runs.mode().values == round(2 * _PEN_RADIUS)


def test_our_lines_have_as_much_ink_as_omniglots(real):
    """Ink per length of outline, which tells a thick pen from a thin one at any extent."""

    def width(images):
        padded = torch.nn.functional.pad((images == INK).int(), (1, 1, 1, 1))
        outline = padded.diff(dim=1).abs().sum() + padded.diff(dim=2).abs().sum()
        return (2 * padded.sum() / outline).item()

    nearest = ((torch.arange(28) + 0.5) * 3.75).long()
    theirs = width(real[:, nearest][:, :, nearest])
    ours = width(torch.cat([image(drawing) for drawing in (CROSS, ZIGZAG, RING)]))
    assert abs(ours / theirs - 1) < 0.15
