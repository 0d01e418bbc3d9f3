"""Any object with a loss is a task, whatever its loss does with the model."""

import itertools
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import nn

import naive
from koi import EngineError, Koi, TaskError, tensor_task
from toys import InTurn, Regression, assert_close, small_net

SETTINGS = {"step_size": 0.05, "num_steps": 3, "num_iterations": 2, "meta_step_size": 0.4}


class Model(nn.Module):
    """Takes one or two inputs; its parts have names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})
        self.scale = 0.5  # an attribute, no parameter

    def forward(self, x, y=None):
        hidden = self.encoder(x).tanh()
        return self.heads["left"](hidden) + (0 if y is None else self.heads["right"](y).tanh())


class Task:
    def __init__(self):
        self.x, self.y = torch.randn(5, 3), torch.randn(5, 4)
        self.targets = torch.randn(5, 2)


class NumpyInside(Task):
    def __init__(self):
        super().__init__()
        self.slope = np.random.uniform(-1, 1, size=(3, 2))

    def loss(self, model):
        x = np.random.uniform(-1, 1, size=(4, 3))
        targets = torch.from_numpy(x @ self.slope)
        return (model(torch.from_numpy(x)) - targets).square().mean()


class TwoInputs(Task):
    def loss(self, model):
        return (model(self.x, y=self.y) - self.targets).square().mean()


class SeveralPasses(Task):
    def loss(self, model):
        one, two = model(self.x), model(2 * self.x, self.y)
        return (one - self.targets).square().mean() + (one - two).abs().sum() / 10


class NamedParts(Task):
    def loss(self, model):
        hidden = model.encoder(self.x).relu()
        heads = [model.heads[name](hidden) for name in ("left", "right")]
        return (model.scale * sum(heads) - self.targets).square().mean()


class PartWithoutGradient(Task):
    def loss(self, model):
        with torch.no_grad():
            goal = model(self.x) + self.targets
        return (model(self.x, self.y) - goal).square().mean()


class Regularised(Task):
    def loss(self, model):
        fit = (model(self.x) - self.targets).square().mean()
        return fit + 0.01 * sum(p.square().sum() for p in model.parameters())


class GradientInside(Task):
    """As in physics: the loss has the derivative of the model with respect to its input."""

    def loss(self, model):
        x = self.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - self.x).square().mean()


class Branching(Task):
    def loss(self, model):
        loss = (model(self.x) - self.targets).square().mean()
        return loss if loss.item() > 1 else 2 * loss


class Minibatches(Task):
    """An endless stream, and a query set that is made when asked for."""

    def minibatches(self, num_steps):
        for row in itertools.cycle(range(5)):
            yield Regression(self.x[row], self.targets[row])

    @cached_property
    def query(self):
        return Regression(-self.x, self.targets)

    def loss(self, model):
        raise AssertionError("the minibatches and the query set stand in for the task")


KINDS = [
    NumpyInside,
    TwoInputs,
    SeveralPasses,
    NamedParts,
    PartWithoutGradient,
    Regularised,
    GradientInside,
    Branching,
    Minibatches,
]


class Naturally:
    """A distribution for the twin: it gives as many minibatches as there are steps."""

    def __init__(self, kind, num_steps):
        self.kind, self.num_steps = kind, num_steps

    def sample(self):
        task = self.kind()
        if self.kind is Minibatches:
            endless = task.minibatches
            task.minibatches = lambda num_steps: itertools.islice(endless(num_steps), num_steps)
        return task


def reseed():
    torch.manual_seed(1)
    np.random.seed(1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_the_naive_twin(kind, algorithm):
    model = Model()
    twin = deepcopy(model)
    settings = SETTINGS | {"meta_batch_size": 2, "algorithm": algorithm}

    class Tasks:
        def sample(self):
            return kind()

    reseed()
    Koi(model, **settings).train(Tasks())
    reseed()
    naive.meta_train(twin, Naturally(kind, 3), **settings)
    assert_close(model, twin)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k not in (NumpyInside, PartWithoutGradient, Branching)]
)
def test_maml(kind):
    model = Model()
    twin = deepcopy(model)
    settings = SETTINGS | {"num_iterations": 1, "num_steps": 2, "algorithm": "maml"}
    task = Naturally(kind, 2).sample()
    Koi(model, **settings).train(InTurn(task))
    naive.meta_train(twin, InTurn(task), **settings)
    assert_close(model, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_adapt(kind):
    model = Model()
    task = kind()
    koi = Koi(model, **SETTINGS)
    reseed()
    losses = koi.evaluate(InTurn(task), num_tasks=1).losses
    assert losses.shape == (1, 4)
    assert not losses.requires_grad
    reseed()
    adapted = koi.adapt(task)
    reseed()
    steps = list(itertools.islice(task.minibatches(3), 3)) if kind is Minibatches else [task] * 3
    assert_close(adapted, naive.adapt(model, steps, torch.optim.SGD, 0.05)[0])


def test_tasks_of_several_kinds_in_one_distribution():
    koi = Koi(Model(), meta_batch_size=3, **SETTINGS)
    koi.train(InTurn(TwoInputs(), NamedParts(), Minibatches(), Branching()))
    assert len(koi.history) == 2


def test_too_few_minibatches():
    class Short(Task):
        def minibatches(self, num_steps):
            return [self] * (num_steps - 1)

        loss = TwoInputs.loss

    with pytest.raises(TaskError, match=r"minibatches\(3\) of Short gave 2") as caught:
        Koi(Model(), **SETTINGS).train(InTurn(Short()))
    assert "meta-iteration 0" in str(caught.value)


def test_everything_inside_no_grad():
    """A caller who switched gradients off gets them where they are needed, and only there."""
    plain = small_net()
    model = deepcopy(plain)
    task = Regression(torch.randn(6, 3), torch.randn(6, 2))
    for algorithm in ("reptile", "fomaml", "maml"):
        Koi(plain, algorithm=algorithm, **SETTINGS).train(InTurn(task))
        with torch.no_grad():
            Koi(model, algorithm=algorithm, **SETTINGS).train(InTurn(task))
            assert not torch.is_grad_enabled()
    assert_close(model, plain)


@tensor_task
@dataclass
class Moving:
    """A window that each call of the loss moves on."""

    t: torch.Tensor

    def loss(self, model):
        self.t += 0.1
        return (model(self.t) - self.t.sin()).square().mean()


class Windows:
    """The same three, again and again."""

    def __init__(self):
        self.all = [Moving(torch.full((3, 1), float(start))) for start in range(3)]
        self.number = 0

    def sample(self):
        self.number += 1
        return self.all[self.number % 3]


def trained_on_windows(vectorize):
    torch.manual_seed(0)
    learner = Koi(
        nn.Linear(1, 1), 0.01, 3, num_iterations=4, meta_batch_size=3, vectorize=vectorize, seed=0
    )
    learner.train(Windows())
    return learner


def test_what_a_loss_changes_in_place_is_kept_or_refused():
    alone, auto = trained_on_windows(False), trained_on_windows("auto")
    assert auto.engine == "eager"
    assert torch.equal(auto.model.weight, alone.model.weight)
    with pytest.raises(EngineError, match="changes the task's own tensors in place"):
        trained_on_windows(True)
