"""Tensor tasks, networks and runs that the tests of the engines share."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import koi
from koi import Koi

# vectorize and compile of each engine
ENGINES = {
    "eager": (False, False),
    "vectorized": (True, False),
    "compiled": (False, True),
    "vectorized+compiled": (True, True),
}
FAST = [name for name in ENGINES if name != "eager"]
ALGORITHMS = ["reptile", "eigen-reptile", "fomaml", "maml"]
SETTINGS = {
    "step_size": 0.02,
    "num_steps": 3,
    "num_iterations": 4,
    "meta_step_size": 0.3,
    "meta_batch_size": 3,
    "seed": 1,
}


@koi.tensor_task
@dataclass
class Fit:
    """Fit y at x; there is nothing else."""

    x: Tensor
    y: Tensor

    def loss(self, model):
        return F.mse_loss(model(self.x), self.y)


@koi.tensor_task
@dataclass
class SplitFit:
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


class Fits:
    """Random tasks of six examples with inputs of ``shape`` and two targets, drawn apart."""

    def __init__(self, shape=(3,), kind=SplitFit):
        self.shape, self.kind = shape, kind

    def sample(self):
        data = torch.randn(6, *self.shape), torch.randn(6, 2)
        if self.kind is not SplitFit:
            return self.kind(*data)
        return SplitFit(*data, torch.randn(4, *self.shape), torch.randn(4, 2))


class Encoder(nn.Module):
    """A transformer layer and a head."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        # the biases of queries, keys and values are one parameter; the gradient of the keys' is
        # zero but for rounding, of which Adam would make full steps
        self.layer.self_attn.in_proj_bias.requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def mlp():
    """3 → 4 → 2 with tanh."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def conv():
    """A convolution, without the bias that BatchNorm would cancel, with running statistics."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


# how each network is made, and the shape of its inputs
NETS = {"mlp": (mlp, (3,)), "conv": (conv, (1, 4, 4)), "encoder": (Encoder, (3, 4))}

OPTIMIZERS = {
    "sgd": {"inner_optimizer": "sgd"},
    "momentum": {"inner_optimizer": partial(torch.optim.SGD, momentum=0.9)},
    "adam carry": {"inner_optimizer": "adam", "inner_state": "carry"},
    "adam reset": {"inner_optimizer": "adam", "inner_state": "reset"},
}


def trained(engine, model, tasks, **settings):
    """Return a learner that trained a copy of ``model`` in the engine of this name."""
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | settings
    learner = Koi(deepcopy(model), vectorize=vectorize, compile=compile, **settings)
    learner.train(tasks)
    assert learner.engine == engine
    return learner


def auto(model, tasks, **settings):
    """Return a learner that trained a copy of ``model`` in the engine that it chose."""
    learner = Koi(deepcopy(model), vectorize="auto", **(SETTINGS | settings))
    learner.train(tasks)
    return learner


def log_lines(caplog):
    """Return what Koi has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "koi"]


def everything(learner):
    """Return all that training gives but the time it took: φ, buffers, moments, history."""
    kept = [
        (r.loss_before, r.loss_after, r.meta_step_size, r.update_norm, r.num_skipped)
        for r in learner.history
    ]
    return dict(learner.model.state_dict()), learner.state_dict()["moments"] or [], kept


def assert_agree(one, other, tolerance=1e-10):
    """Assert that two learners are in the same state, up to rounding."""
    pair = everything(one), everything(other)
    torch.testing.assert_close(*pair, rtol=0, atol=tolerance, equal_nan=True)


def moved(learner, start):
    """Return whether every learned parameter has left its place in ``start``."""
    pairs = zip(learner.model.parameters(), start.parameters(), strict=True)
    return all(not torch.equal(p, q) for p, q in pairs if p.requires_grad)
