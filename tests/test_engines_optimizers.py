"""Which inner optimizers run in which engine: equal to the eager one, or refused."""

import functools
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine_toys import SETTINGS, Fit, Fits, assert_agree, mlp, trained
from koi import EngineError, Koi

pytestmark = pytest.mark.usefixtures("float64")

RULES = {
    "nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "weight decay": functools.partial(torch.optim.SGD, weight_decay=0.1),
    "adam as in the paper": functools.partial(torch.optim.Adam, betas=(0.0, 0.999)),
    "adam with weight decay": functools.partial(torch.optim.Adam, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
}
# Element by element, but not written out in Koi: they step the stacked parameters themselves.
OTHERS = {
    "dampening": functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.5),
    "maximize": functools.partial(torch.optim.SGD, maximize=True),
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("optimizer", RULES | OTHERS)
def test_every_optimizer_vectorized(optimizer, algorithm, inner_state):
    settings = {
        "inner_optimizer": (RULES | OTHERS)[optimizer],
        "algorithm": algorithm,
        "inner_state": inner_state,
    }
    start = mlp()
    eager, other = (trained(name, start, Fits(), **settings) for name in ("eager", "vectorized"))
    assert_agree(other, eager)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
@pytest.mark.parametrize("optimizer", RULES)
def test_every_optimizer_in_the_graph(optimizer, engine):
    start = mlp()
    eager, other = (
        trained(name, start, Fits(), inner_optimizer=RULES[optimizer]) for name in ("eager", engine)
    )
    assert_agree(other, eager)


def global_norm(params, lr):
    """SGD on the gradient divided by its norm over all parameters."""

    class Normalised(torch.optim.SGD):
        def step(self, closure=None):
            params = self.param_groups[0]["params"]
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            for param in params:
                param.grad = param.grad / norm
            return super().step(closure)

    return Normalised(params, lr)


# The step of one task's parameters depends on the others', where they are stacked.
MIXING = {"global norm": global_norm, "Adafactor": torch.optim.Adafactor}


class Matrices(nn.Module):
    """Parameters that Muon takes, too: matrices only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("name", [*MIXING, "Muon"])
def test_optimizers_that_are_not_element_wise(name, caplog):
    optimizer = MIXING.get(name) or torch.optim.Muon
    model = Matrices() if name == "Muon" else mlp()
    tasks = Fits(kind=Fit)
    settings = SETTINGS | {"inner_optimizer": optimizer}
    learner = Koi(deepcopy(model), vectorize="auto", **settings)
    learner.train(tasks)
    assert learner.engine == "eager"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "koi"]
    assert "does not work element by element" in line
    assert_agree(learner, trained("eager", model, tasks, inner_optimizer=optimizer), tolerance=0)
    with pytest.raises(EngineError, match="does not work element by element"):
        trained("vectorized", model, tasks, inner_optimizer=optimizer)
