"""Koi compares the engine that it chose with a plain loop, on the user's own first tasks."""

import logging
import random
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koi as package
from engine_toys import ALGORITHMS, ENGINES, SETTINGS, Fit, Fits, assert_agree, mlp, trained
from koi import EngineError, Koi, ModelError
from koi.inner.checks.selfcheck import SelfCheck
from koi.randomness import capture, same_states
from toys import InTurn

pytestmark = pytest.mark.usefixtures("float64")


class ByReference(nn.Module):
    """Reaches its weight by a tuple too, past the name that other tensors are put under."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(3, 3)
        self.held = (self.inward.weight,)

    def forward(self, x):
        return (torch.tanh(self.inward(x)) @ self.held[0])[:, :2]


class WrongTwice(torch.autograd.Function):
    """x³, whose second derivative is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return HalfDerivative.apply(x) * grad


class HalfDerivative(torch.autograd.Function):
    """3x², with the derivative 3x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 3 * x**2

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad


class Cubed(nn.Linear):
    def forward(self, x):
        return WrongTwice.apply(super().forward(x))


def dropped():
    return nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2))


@pytest.fixture
def looks(monkeypatch):
    """Return the forms that were compared so far."""
    seen, run = [], SelfCheck.run
    monkeypatch.setattr(
        SelfCheck, "run", lambda self: [seen.append(self._request.form), run(self)][1]
    )
    return seen


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make", [mlp, dropped])
@pytest.mark.parametrize("seed", [None, 1])
def test_it_says_nothing_and_leaves_nothing_behind(make, algorithm, engine, seed, caplog, looks):
    """Whatever a run does with it, it does without."""
    caplog.set_level(logging.WARNING, "koi")
    model, states, learners = make(), [], []
    for check in (True, False):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        settings = {"algorithm": algorithm, "seed": seed, "check": check, "num_iterations": 2}
        learners.append(trained(engine, model, Fits(), **settings))
        states.append(capture())
    assert looks == [engine]
    assert_agree(*learners, tolerance=0)
    assert same_states(*states)
    assert not caplog.records


def test_an_engine_that_differs_is_left_for_a_slower_one(caplog):
    model = ByReference()
    tasks = Fits(kind=Fit)
    learner = Koi(deepcopy(model), **SETTINGS)
    learner.train(tasks)
    assert learner.engine == "eager"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'vectorized' does not give for Fit what the plainest loop gives" in line
    assert "inward.weight" in line
    assert_agree(learner, trained("eager", model, tasks, check=False), tolerance=0)
    with pytest.raises(EngineError, match=r"inward\.weight"):
        trained("vectorized", model, tasks)


@pytest.mark.usefixtures("untraced")
def test_a_compiled_engine_too(caplog):
    model = ByReference()
    learner = Koi(deepcopy(model), compile=True, vectorize=False, **SETTINGS)
    learner.train(Fits(kind=Fit))
    assert learner.engine == "eager"
    assert "'compiled' does not give" in caplog.text
    assert_agree(learner, trained("eager", model, Fits(kind=Fit)), tolerance=0)


def test_where_nothing_is_slower_it_is_an_error():
    """MAML puts other weights under the names of the module's, and the tuple still has these."""
    with pytest.raises(EngineError, match=r"'eager' does not give .* inward\.weight"):
        trained("eager", ByReference(), Fits(kind=Fit), algorithm="maml")


def test_second_derivative_that_is_wrong():
    model = Cubed(3, 2)
    with pytest.raises(EngineError, match=r"'eager' does not give for Fit .* weight"):
        trained("eager", model, Fits(kind=Fit), algorithm="maml")
    trained("eager", model, Fits(kind=Fit), algorithm="fomaml")


def test_loss_of_the_users_own_module():
    model = mlp()

    class Past(Fit):
        def loss(self, _):
            return F.mse_loss(model(self.x), self.y) + _(self.x).sum()

    package.tensor_task(Past)
    with pytest.raises(ModelError, match=r"reaches 0\.weight, .* of the module that Koi was given"):
        Koi(model, **SETTINGS).train(Fits(kind=Past))


def test_closure_over_the_users_own_module():
    class Lambda(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.features = lambda x: torch.tanh(self.layer(x))

        def forward(self, x):
            return self.head(self.features(x))

    with pytest.raises(ModelError, match=r"layer\.weight"):
        Koi(Lambda(), **SETTINGS).train(Fits(kind=Fit))


def test_it_can_be_left_out(looks):
    learner = Koi(ByReference(), check=False, **SETTINGS)
    learner.train(Fits(kind=Fit))
    assert learner.engine == "vectorized"
    assert looks == []


def test_it_looks_again_where_something_has_changed(looks):
    model = mlp()
    learner = Koi(model, **SETTINGS)
    learner.train(Fits())
    learner.num_iterations = 8
    learner.train(Fits())
    assert looks == ["vectorized"]
    learner.evaluate(Fits(), 3)
    assert looks == ["vectorized"] * 2  # adapting is another thing than a meta-batch
    learner.step_size = 0.01
    learner.evaluate(Fits(), 3)
    model[0].requires_grad_(False)
    learner.evaluate(Fits(), 3)
    assert looks == ["vectorized"] * 4


def test_where_things_change_all_the_time_it_looks_now_and_then(looks):
    learner = Koi(mlp(), **(SETTINGS | {"num_iterations": 9}))

    def anneal(koi, record):
        koi.step_size *= 0.9

    learner.train(Fits(), callbacks=[anneal])
    assert looks == ["vectorized"] * 5  # at first, and after 1, 2, 4 and 8 changes


@pytest.mark.usefixtures("untraced")
def test_after_eight_changes_nothing_more_is_compiled(caplog):
    model, engines = mlp(), []

    def anneal(koi, record):
        engines.append(koi.engine)
        koi.step_size *= 0.9

    settings = SETTINGS | {"num_iterations": 10}
    compiled = Koi(deepcopy(model), compile=True, **settings)
    compiled.train(Fits(), callbacks=[anneal])
    assert engines == ["vectorized+compiled"] * 8 + ["vectorized"] * 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "changed 8 times in this training: running uncompiled" in line
    eager = Koi(deepcopy(model), vectorize=False, **settings)
    eager.train(Fits(), callbacks=[anneal])
    assert_agree(compiled, eager)


def test_tasks_are_not_used_up():
    """What a loss does to its task it does to copies, and φ is what it would be without."""

    class Walk:
        def __init__(self):
            self.position = torch.zeros(4, 3)
            self.seen = 0

        def loss(self, model):
            self.seen += 1
            self.position += 0.1
            return model(self.position).square().mean()

    learners = []
    for check in (True, False):
        tasks = [Walk() for _ in range(2)]
        torch.manual_seed(0)
        koi = Koi(mlp(), 0.02, 3, 1, meta_batch_size=2, seed=1, check=check)
        koi.train(InTurn(*tasks))
        assert [task.seen for task in tasks] == [3, 3]
        learners.append(koi)
    assert_agree(*learners, tolerance=0)


def test_bias_before_a_normalisation_is_no_disagreement(caplog):
    """Its gradient is rounding noise, of which Adam makes full steps in every right way."""
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = lambda params, lr: torch.optim.Adam(params, lr, betas=(0.0, 0.999))  # noqa: E731
    for seed in range(5):
        learner = Koi(deepcopy(net), inner_optimizer=optimizer, **(SETTINGS | {"seed": seed}))
        learner.train(Fits())
        assert learner.engine == "vectorized"
    assert not caplog.records


@package.tensor_task
@dataclass
class AtKinks:
    """Every weight stands where ReLU has its kink; all at once, beside it by rounding."""

    kinks: torch.Tensor

    def loss(self, model):
        at_once = torch._C._functorch.is_batchedtensor(self.kinks)
        values = torch.cat([part.bias for part in model])
        return F.relu(values - self.kinks * (1 - 2e-16 * at_once)).sum()


def test_kinks_that_rounding_crosses_are_no_disagreement(caplog):
    """In one of two cases a change of φ crosses one, too."""
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(16)])
    kinks = torch.rand(16) + 1
    for part, kink in zip(model, kinks, strict=True):
        nn.init.constant_(part.bias, kink)
    learner = Koi(model, **SETTINGS)
    learner.train(InTurn(*[AtKinks(kinks) for _ in range(12)]))
    assert learner.engine == "vectorized"
    assert not caplog.records


def test_torch_has_weight_norms_second_derivative_wrong():
    """When this fails, `map_weight_norm` may go."""
    size, direction = torch.rand(2, 1).requires_grad_(), torch.randn(2, 3).requires_grad_()

    def norm(direction, size):
        return torch._weight_norm(direction, size, 0)

    inputs = direction, size
    assert torch.autograd.gradcheck(norm, inputs)
    assert not torch.autograd.gradgradcheck(norm, inputs, raise_exception=False)
