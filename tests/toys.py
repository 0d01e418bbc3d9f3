"""Small models and tasks that many tests share."""

import itertools
import multiprocessing

import torch
from torch import nn
from torch.nn import functional as F


class Begun:
    """The processes that were begun since this was made, and live; ranks of other tests may too."""

    def __init__(self):
        self._others = multiprocessing.active_children()

    def __call__(self):
        return [p for p in multiprocessing.active_children() if p not in self._others]


class Point(nn.Module):
    """A model that is nothing but its parameter."""

    def __init__(self, *values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))


class Quadratic:
    """a/2 · |w − c|²: k SGD steps at η take w to c + (1 − η a)^k (w − c)."""

    def __init__(self, centre, curvature=1.0):
        self.centre = torch.as_tensor(centre)
        self.curvature = curvature

    def loss(self, model):
        return self.curvature / 2 * (model.weight - self.centre).square().sum()


class InTurn:
    """A distribution that gives the same tasks again and again, in turn."""

    def __init__(self, *tasks):
        self._tasks = itertools.cycle(tasks)

    def sample(self):
        return next(self._tasks)


class Regression:
    """Fit targets; every inner step sees all the data."""

    def __init__(self, inputs, targets):
        self.inputs = inputs
        self.targets = targets

    def loss(self, model):
        return F.mse_loss(model(self.inputs), self.targets)


class SplitRegression(Regression):
    """The same with minibatches of two examples, and with a query set."""

    def __init__(self, inputs, targets, query):
        super().__init__(inputs, targets)
        self.query = query

    def minibatches(self, num_steps):
        for step in range(num_steps):
            rows = [2 * step % len(self.inputs), (2 * step + 1) % len(self.inputs)]
            yield Regression(self.inputs[rows], self.targets[rows])


class Regressions:
    """Random inputs (6, 3) and targets (6, 2), from torch's global generator."""

    def __init__(self, split=False):
        self.split = split

    def sample(self):
        task = Regression(torch.randn(6, 3), torch.randn(6, 2))
        if not self.split:
            return task
        query = Regression(torch.randn(5, 3), torch.randn(5, 2))
        return SplitRegression(task.inputs, task.targets, query)


def small_net():
    """3 → 4 → 2 with tanh."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def snapshot(model):
    """Return copies of all parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model, expected):
    """Assert that ``model`` has the values of a snapshot or of another model, bit for bit."""
    if isinstance(expected, nn.Module):
        expected = snapshot(expected)
    actual = snapshot(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_close(model, expected, rtol=1e-9, atol=1e-12):
    """Assert that ``model`` has the values of another model, up to rounding."""
    torch.testing.assert_close(snapshot(model), snapshot(expected), rtol=rtol, atol=atol)
