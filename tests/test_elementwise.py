"""What mixes the tasks whose parameters are stacked is noticed; what does not is let through."""

from functools import partial

import pytest
import torch

from koi import EngineError
from koi.inner.optimizers.elementwise import check_elementwise
from optimizer_toys import Prodigal, Toy, inner_of, leaves, noisy, start_params

pytestmark = pytest.mark.usefixtures("float64")


def normalised(params, lr):
    """By the norm over all parameters that it is given."""

    class Normalised(torch.optim.SGD):
        def step(self, closure=None):
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            for param in params:
                param.grad = param.grad / norm
            return super().step(closure)

    return Normalised(params, lr)


def bounded(params, lr, most=1000.0):
    """Gradients are cut off where they are very long."""

    class Bounded(torch.optim.SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(params, most)
            return super().step(closure)

    return Bounded(params, lr)


def centred(group, state, grad):
    """Matrices are treated otherwise than vectors."""
    state["mean"] = grad.mean(0) if grad.ndim > 1 else grad.clone()


def noticed(group, state, grad):
    group["largest"] = max(group["largest"], grad.abs().max().item())


MIXING = {
    "norm": (normalised, [(2, 3), (4,)]),
    "cut off": (bounded, [(2, 3), (4,)]),
    "Adafactor": (torch.optim.Adafactor, [(2, 3), (4,)]),
    "Adafactor on vectors": (torch.optim.Adafactor, [(4,)]),
    **({"Muon": (torch.optim.Muon, [(2, 3)])} if hasattr(torch.optim, "Muon") else {}),
    "by dimensions": (partial(Toy, after=centred), [(4,)]),
    "Prodigy": (Prodigal, [(2, 3), (4,)]),
    "seen by its state alone": (partial(Toy, after=noticed, largest=0.0), [()]),
    "noise": (noisy, [(40,)]),
}
ELEMENTWISE = {
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "rprop": torch.optim.Rprop,
    "tiny rate": lambda params, lr: torch.optim.Adagrad(params, 1e-6),
    "two groups": lambda params, lr: torch.optim.NAdam(
        [{"params": params[:1], "lr": lr}, {"params": params[1:]}]
    ),
    "part": lambda params, lr: torch.optim.ASGD(params[1:], lr),
}
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tasks_is_noticed(name, dtype):
    factory, shapes = MIXING[name]
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    with pytest.raises(EngineError, match=r"does not work element by element"):
        check_elementwise(inner_of(factory, params), params)
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_does_not_is_let_through(name, dtype):
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in [(2, 3), (4,), ()]]
    before = torch.get_rng_state()
    check_elementwise(inner_of(ELEMENTWISE[name], params), params)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mixture_of_tiny_steps_is_noticed():
    """They are small beside the parameters, not beside each other."""
    params = leaves(start_params())
    with pytest.raises(EngineError, match=r"does not work element by element"):
        check_elementwise(inner_of(lambda ps, lr: normalised(ps, 1e-7), params), params)
