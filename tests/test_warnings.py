"""Warnings that save an afternoon: each comes where it should, once, and only there."""

import warnings

import pytest
import torch

from koi import Koi, KoiWarning
from toys import InTurn, Point, Quadratic, Regressions, small_net


def caught(tasks, model=None, **settings):
    """Return the messages of the warnings in a training."""
    koi = Koi(model or Point(1.0), **{"num_iterations": 3, "num_steps": 2} | settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        koi.train(tasks)
    assert all(warning.category is KoiWarning for warning in found)
    return [str(warning.message) for warning in found]


STEEP = Quadratic(0.0, curvature=100.0)  # a step of 0.03 goes from w to −2 w
GENTLE = Quadratic(0.0)


class TestOneInnerStep:
    def test_fires_once(self):
        (message,) = caught(InTurn(GENTLE), num_steps=1)
        assert "num_steps = 1" in message
        assert "joint training" in message

    def test_two_steps_are_fine(self):
        assert caught(InTurn(GENTLE), num_steps=2) == []

    @pytest.mark.parametrize("algorithm", ["fomaml", "maml"])
    def test_one_step_is_fine_elsewhere(self, algorithm):
        """Their update is taken after the step, so that one step is already meta-learning."""
        assert caught(InTurn(GENTLE), num_steps=1, algorithm=algorithm) == []


class TestZeroUpdate:
    @pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
    def test_fires_once_where_the_loss_is_flat(self, algorithm):
        (message,) = caught(InTurn(Quadratic(1.0)), algorithm=algorithm)
        assert "exactly zero" in message

    def test_fires_where_the_loss_depends_on_something_else(self):
        class Elsewhere:
            def loss(self, model):
                return torch.ones((), requires_grad=True)

        (message,) = caught(InTurn(Elsewhere()))
        assert "exactly zero" in message

    def test_fires_with_a_meta_optimizer(self):
        messages = caught(InTurn(Quadratic(1.0)), meta_optimizer=lambda p: torch.optim.SGD(p, 0.1))
        assert len(messages) == 1

    def test_a_small_update_is_fine(self):
        assert caught(InTurn(Quadratic(1.001)), step_size=1e-3, meta_step_size=0.1) == []

    def test_zero_epsilon_is_meant(self):
        assert caught(InTurn(GENTLE), meta_step_size=0.0) == []
        assert caught(InTurn(GENTLE), meta_step_size=lambda done: 0.0) == []

    def test_skipped_meta_batches_are_not_counted(self):
        nan = Quadratic(float("nan"))
        assert caught(InTurn(nan), on_nonfinite="skip") == []


STEEP_STEPS = {"step_size": 0.03, "num_steps": 3, "meta_step_size": 0.0}


class TestRisingLoss:
    @pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
    @pytest.mark.parametrize("meta_batch_size", [1, 4])
    def test_fires_once_where_steps_are_too_large(self, meta_batch_size, algorithm):
        shared = STEEP_STEPS | {"meta_batch_size": meta_batch_size, "algorithm": algorithm}
        (message,) = caught(InTurn(STEEP), num_iterations=400, **shared)
        assert "the loss rose in the inner loop" in message
        assert "step_size is probably too large" in message

    def test_some_rising_tasks_are_fine(self):
        half = InTurn(STEEP, GENTLE)
        assert caught(half, num_iterations=400, **STEEP_STEPS) == []

    def test_most_are_not(self):
        most = InTurn(STEEP, STEEP, STEEP, STEEP, GENTLE)
        assert len(caught(most, num_iterations=400, **STEEP_STEPS)) == 1

    def test_a_few_tasks_are_no_sign(self):
        assert caught(InTurn(STEEP), num_iterations=20, **STEEP_STEPS) == []

    def test_noise_is_no_sign(self):
        """Losses on different minibatches go up and down by chance."""
        tasks = Regressions(split=True)
        settings = STEEP_STEPS | {"step_size": 1e-4, "num_iterations": 400}
        assert caught(tasks, model=small_net(), **settings) == []


def test_warnings_point_at_the_users_line():
    koi = Koi(Point(1.0), num_steps=1, num_iterations=1, meta_step_size=1.0)
    with pytest.warns(KoiWarning) as found:
        koi.train(InTurn(Quadratic(1.0)))
    assert len(found) == 2
    assert {warning.filename for warning in found} == {__file__}


def test_a_warning_made_an_error_leaves_a_whole_state():
    koi = Koi(Point(1.0), num_steps=2, num_iterations=2)
    with pytest.raises(KoiWarning):
        koi.train(InTurn(Quadratic(1.0)))
    assert koi.iteration == len(koi.history) == 1
