"""Tasks with a state, trainings that stop in the midst, and what makes two of them the same."""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from koi import Koi, linear, tensor_task
from toys import assert_same

SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": 7, "meta_batch_size": 2}


@tensor_task
@dataclass
class Line:
    inputs: torch.Tensor
    targets: torch.Tensor

    def loss(self, model):
        noise = torch.randn_like(self.inputs)
        return F.mse_loss(model(self.inputs + 0.1 * noise), self.targets)


class Lines:
    """Draws from all three global generators."""

    def sample(self):
        level = random.random() + np.random.rand()
        return Line(torch.randn(4, 3), level * torch.randn(4, 2))


class Stateful(Lines):
    """Counts on its own, and what it gives depends on the count."""

    def __init__(self):
        self.state = {"count": 0, "scale": torch.tensor(1.0)}

    def sample(self):
        self.state["count"] += 1
        self.state["scale"] *= 1.01
        task = super().sample()
        return replace(task, targets=task.targets * self.state["scale"] + self.state["count"])

    def state_dict(self):
        return self.state  # an alias, as torch's own state_dict gives

    def load_state_dict(self, state):
        self.state = state


def net():
    """A module with buffers of both kinds, dropout and a frozen parameter."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)
    )
    model[1].bias.requires_grad_(False)
    return model


def velocity(params, lr):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def by_torch(params, lr):
    return torch.optim.RMSprop(params, lr=lr, momentum=0.5)


def meta_adam(params):
    return torch.optim.Adam(params, lr=0.05)


CASES = {
    "sgd": {},
    "sgd with momentum": {"inner_optimizer": velocity},
    "adam": {"inner_optimizer": "adam", "meta_step_size": linear(1.0, 0.0)},
    "adam reset": {"inner_optimizer": "adam", "inner_state": "reset"},
    "an optimizer without a rule": {"inner_optimizer": by_torch},
    "meta adam": {"meta_optimizer": meta_adam},
    "a schedule of the user's": {"meta_step_size": lambda fraction: 0.5 - fraction / 4},
    "fomaml": {"algorithm": "fomaml", "inner_optimizer": "adam"},
    "maml": {"algorithm": "maml", "inner_optimizer": "adam", "meta_optimizer": meta_adam},
    "unseeded": {"seed": None, "inner_optimizer": "adam"},
    "bfloat16": {"autocast": torch.bfloat16},
    "float16": {"autocast": torch.float16},
    "in chunks": {"chunk_size": 1},
}


class Stop(Exception):  # noqa: N818
    """What stops a training in these tests."""


class StopsInside(Stateful):
    """Raises while the fourth meta-batch is drawn, after some of its draws."""

    error = Stop

    def sample(self):
        if self.state["count"] == 2 * 3 + 1:
            raise self.error
        return super().sample()


def stops_after(iteration, error=Stop):
    def callback(koi, record):
        if record.iteration + 1 == iteration:
            raise error

    return callback


def learner(model, case, vectorize):
    return Koi(model, **{**SETTINGS, "seed": 0, "vectorize": vectorize, **case})


def reseed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def uninterrupted(case, vectorize):
    reseed(1)
    koi = learner(net(), case, vectorize)
    koi.train(Stateful())
    return koi


def assert_same_training(koi, whole):
    assert_same(koi.model, whole.model)
    assert koi.iteration == whole.iteration
    assert koi.engine == whole.engine
    known = [[replace(record, seconds=0) for record in k.history] for k in (koi, whole)]
    assert known[0] == known[1]
    here, there = koi.state_dict(), whole.state_dict()
    assert all(map(torch.equal, here["moments"] or [], there["moments"] or []))
    assert here["scale"] == there["scale"]
