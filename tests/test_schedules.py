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


def test_default_of_reptile_falls_from_one_to_zero():
    assert used(None) == [1.0, 0.75, 0.5, 0.25]
    koi = Koi(Point(1.0))
    assert koi.meta_step_size is None


@pytest.mark.parametrize("algorithm", ["fomaml", "maml"])
def test_default_of_a_gradient_is_step_size(algorithm):
    assert used(None, algorithm=algorithm) == [0.1] * 4


def test_default_follows_settings_that_change():
    koi = Koi(Point(1.0), 0.1, 2, 2)
    koi.train(InTurn(Quadratic(0.0)))
    koi.algorithm, koi.step_size, koi.num_iterations = "fomaml", 0.25, 4
    koi.train(InTurn(Quadratic(0.0)))
    assert [record.meta_step_size for record in koi.history] == [1.0, 0.5, 0.25, 0.25]


@pytest.mark.usefixtures("float64")
def test_default_learns():
    """Tasks at random around a centre that is far away: φ gets there, and is near it at the end.

    With k = 5 steps of 0.02, φ̃ is a tenth of the way to a task's centre. A constant ε of 0.02
    would leave φ where it began, at a distance of 5; one that stays large would leave it a
    twentieth of the tasks' variance away.
    """

    class Around:
        def sample(self):
            return Quadratic(5 + torch.randn(400))

    model = Point(*[0.0] * 400)
    Koi(model, 0.02, 5, 100, seed=0).train(Around())
    assert (model.weight - 5).square().mean().item() < 0.03


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
