"""The loss scale of float16: gradients come out as they are, or not at all."""

import pytest
import torch

from koi.inner.scaling import LossScale


def scaled(grads, factor):
    return [None if grad is None else factor * grad for grad in grads]


def test_gradients_come_out_as_they_are():
    scale = LossScale()
    grads = [torch.randn(3, 2), None, torch.randn(())]
    back = scale.unscaled(scaled(grads, scale.factor))
    for given, found in zip(grads, back, strict=True):
        assert given is found is None or torch.equal(given, found)
    assert scale.state() == (2.0**16, 1)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_that_overflows_has_no_gradients_and_the_factor_is_halved(value):
    scale = LossScale()
    scale.unscaled([torch.ones(2)])
    assert scale.unscaled([torch.ones(2), None, torch.tensor([[1.0, value]])]) is None
    assert scale.state() == (2.0**15, 0)


def test_a_loss_that_uses_no_parameter_has_not_overflowed():
    assert LossScale().unscaled([None, None]) == (None, None)


def test_grows_after_2000_good_steps_in_a_row():
    scale = LossScale()
    for _ in range(1999):
        scale.unscaled([torch.ones(1)])
    scale.unscaled([torch.tensor([torch.inf])])
    for _ in range(1999):
        scale.unscaled([torch.ones(1)])
    assert scale.factor == 2.0**15
    # the gradients of the step at which it grows were made with the factor before
    (grad,) = scale.unscaled([torch.full((1,), 2.0**15)])
    assert grad == 1
    assert scale.state() == (2.0**16, 0)


def test_goes_on_from_a_state():
    one, other = LossScale(), LossScale()
    one.unscaled([torch.tensor([torch.inf])])
    one.unscaled([torch.ones(1)])
    other.put(one.state())
    assert other.state() == (2.0**15, 1)
