"""The tasks of the table of cases, and the distributions that they are drawn from."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import koi

FACTOR = 0.5


@koi.tensor_task
@dataclass
class Fit:
    """Fit y at x; there is nothing else."""

    x: Tensor
    y: Tensor

    def loss(self, model):
        return F.mse_loss(model(self.x), self.y)


class Plain:
    """The same, but no tensor task."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    loss = Fit.loss


@koi.tensor_task
@dataclass
class Split:
    """Minibatches of three examples that overlap, and a query set."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def query(self):
        return Fit(self.query_x, self.query_y)

    def minibatches(self, num_steps):
        for step in range(num_steps):
            rows = [(2 * step + k) % len(self.x) for k in range(3)]
            yield Fit(self.x[rows], self.y[rows])

    def loss(self, model):
        raise AssertionError("the minibatches and the query set stand in for the task")


@koi.tensor_task
@dataclass
class Walk(Fit):
    """A loss that moves the task itself on: the inputs of the next step are others."""

    def loss(self, model):
        prediction = model(self.x)
        self.x = self.x + F.pad(prediction.detach(), (0, 1))
        return F.mse_loss(prediction, self.y)


@koi.tensor_task
@dataclass
class Weighted(Split):
    """A task that counts more or less than another."""

    weight: Tensor


class Shadowed(Fit):
    """An attribute that is no field stands before that of the class."""

    factor = 1.0

    def loss(self, model):
        return self.factor * super().loss(model)


class Unlearning(Fit):
    """Switches the model to evaluation, and leaves it so."""

    def loss(self, model):
        model.eval()
        return super().loss(model)


class UnlearningQuery(Fit):
    """Switches the model to evaluation where it is measured."""

    @property
    def query(self):
        return Unlearning(self.x, self.y)


class ReadsGlobal(Fit):
    def loss(self, model):
        return FACTOR * super().loss(model)


class ReadsClass(Fit):
    factors: ClassVar[dict[str, float]] = {"data": 0.5}

    def loss(self, model):
        return self.factors["data"] * super().loss(model)


class InputDerivative(Fit):
    """Fits the derivative of the model's first output by the inputs, too."""

    def loss(self, model):
        x = self.x.clone().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
        return F.mse_loss(y, self.y) + slope.square().mean()


class InputJacobian(Fit):
    """The same by torch.func."""

    def loss(self, model):
        slope = torch.func.vmap(torch.func.jacrev(lambda x: model(x)[0]))(self.x)
        return super().loss(model) + slope.square().mean()


class GradientPenalty(Fit):
    """A penalty on the gradient of the model's own weights."""

    def loss(self, model):
        loss = super().loss(model)
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in grads)


class Decayed(Fit):
    """A penalty on the weights that learn."""

    def loss(self, model):
        weights = [p for p in model.parameters() if p.requires_grad]
        return super().loss(model) + 0.1 * sum(p.square().sum() for p in weights)


class DecayedQuery(Fit):
    """The same where it is measured."""

    @property
    def query(self):
        return Decayed(self.x, self.y)


@koi.tensor_task
@dataclass
class Typed(Fit):
    """A setting whose type counts, as it does where it divides or is an index."""

    kind: object

    def loss(self, model):
        factor = {int: 1.0, float: 0.5, bool: 0.25}[type(self.kind)]
        return factor * super().loss(model)


for cls in (Shadowed, Unlearning, UnlearningQuery, ReadsGlobal, ReadsClass):
    koi.tensor_task(cls)
for cls in (InputDerivative, InputJacobian, GradientPenalty, Decayed, DecayedQuery):
    koi.tensor_task(cls)


def numbers(*shape):
    """Return how inputs of this shape are drawn for so many examples."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


def sentences(n, generator):
    """Draw words 1 … 4, the last two of three sentences being padding."""
    ids = torch.randint(1, 5, (n, 5), generator=generator)
    ids[: n // 2, 3:] = 0
    return ids


class Stream:
    """A distribution with a generator of its own: the same tasks whatever else draws.

    Args:
        make: a task of inputs and targets; `Split` and `koi.SupervisedTask` get a query set too.
        inputs: draws so many inputs.
        seed: of the generator.
    """

    def __init__(self, make, inputs, seed=0):
        self.make, self.inputs = make, inputs
        self.generator = torch.Generator().manual_seed(seed)
        self.count = 0

    def sample(self):
        return self.make(self)

    def data(self, n=6):
        """Draw inputs and targets of n examples."""
        return self.inputs(n, self.generator), torch.randn(n, 2, generator=self.generator)


def of(kind, *more):
    return lambda stream: kind(*stream.data(), *more)


def shadowing(stream):
    task = Shadowed(*stream.data())
    task.factor = 2.0
    return task


def split(stream):
    return Split(*stream.data(), *stream.data(4))


def weighted(stream):
    stream.count += 1
    weight = torch.tensor((3.0, 0.25, 1.0)[stream.count % 3])
    return Weighted(*stream.data(), *stream.data(4), weight)


def supervised(batch_size):
    def make(stream):
        key = torch.randint(2**40, (), generator=stream.generator)
        return koi.SupervisedTask(*stream.data(), *stream.data(4), key, batch_size=batch_size)

    return make


def in_turn(stream):
    """Settings that are equal and of three types, one after the other."""
    stream.count += 1
    return Typed(*stream.data(), (1, 1.0, True)[stream.count % 3])
