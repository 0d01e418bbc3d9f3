"""ε over the meta-iterations."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from koi import ConfigurationError, Koi, linear
from toys import InTurn, Point, Quadratic, assert_same, snapshot


def used(meta_step_size, num_iterations=4, **settings):
    """Return the ε of each meta-iteration."""
    koi = Koi(Point(1.0), 0.1, 2, num_iterations, meta_step_size=meta_step_size, **settings)
    koi.train(InTurn(Quadratic(0.0)))
    return [record.meta_step_size for record in koi.history]


def test_default_is_step_size():
    assert used(None) == [0.1] * 4


@pytest.mark.parametrize(
    "value", [0.5, 1, 0, Fraction(1, 2), np.float64(0.5), np.float32(0.5), np.int64(1)]
)
def test_constant(value):
    assert used(value) == [float(value)] * 4


def test_linear():
    assert used(linear(1.0, 0.0)) == [1.0, 0.75, 0.5, 0.25]
    assert used(linear(0.25, 1.25)) == [0.25, 0.5, 0.75, 1.0]
    assert linear(3.0, 1.0)(0) == 3.0
    assert linear(3.0, 1.0)(1) == 1.0


def test_callable_gets_the_fraction_done():
    asked = []

    def schedule(fraction):
        asked.append(fraction)
        return fraction / 2

    assert used(schedule, num_iterations=5) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert asked == [0.0, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    "convert", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor([x])]
)
def test_callable_may_return_any_number(convert):
    assert used(lambda fraction: convert(0.5)) == [0.5] * 4


def test_fraction_goes_on_after_an_interruption():
    asked = []

    def schedule(fraction):
        asked.append(fraction)
        return 0.1

    def stop_once(koi, record):
        if asked == [0.0, 0.25]:
            raise StopIteration

    koi = Koi(Point(1.0), 0.1, 2, 4, meta_step_size=schedule)
    with pytest.raises(StopIteration):
        koi.train(InTurn(Quadratic(0.0)), callbacks=[stop_once])
    koi.train(InTurn(Quadratic(0.0)))
    assert asked == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "bad", [-0.1, float("nan"), float("inf"), "much", None, [1.0], torch.ones(2), 1j]
)
def test_callable_that_gives_no_step_size(bad):
    model = Point(1.0)
    before = snapshot(model)
    koi = Koi(model, 0.1, 2, 4, meta_step_size=lambda fraction: bad if fraction == 0.5 else 0.0)
    with pytest.raises(ConfigurationError, match=r"meta_step_size gave .* at the fraction 0\.5"):
        koi.train(InTurn(Quadratic(0.0)))
    assert_same(model, before)
    assert koi.iteration == 2


def test_linear_compares_and_prints_as_data():
    assert linear(1.0, 0.5) == linear(1.0, 0.5) != linear(1.0, 0.0)
    assert repr(linear(1.0, 0.5)) == "linear(start=1.0, end=0.5)"
