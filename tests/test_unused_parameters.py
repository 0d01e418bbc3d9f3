"""Tasks that use different parts of one model, such as a head each."""

import itertools
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import naive
from koi import Koi
from toys import Regression, assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")

SGD = torch.optim.SGD
OPTIMIZERS = {
    "sgd with weight decay": partial(SGD, weight_decay=0.1),
    "momentum": partial(SGD, momentum=0.9),
    "dampening": partial(SGD, momentum=0.9, dampening=0.5),
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "rprop": torch.optim.Rprop,
}
SETTINGS = {"step_size": 0.05, "num_steps": 3, "num_iterations": 6, "meta_step_size": 0.5}


class Heads(nn.Module):
    """Three heads, of which the tasks below use the first two."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))


class OneHead(Regression):
    def __init__(self, head):
        super().__init__(torch.randn(6, 3), torch.randn(6, 2))
        self.head = head

    def loss(self, model):
        hidden = model.trunk(self.inputs).tanh()
        return (model.heads[self.head](hidden) - self.targets).square().mean()


class Alternating:
    """Each head serves for two tasks, then the other."""

    def __init__(self):
        self.count = 0

    def sample(self):
        self.count += 1
        return OneHead((self.count - 1) // 2 % 2)


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_the_naive_twin(name, algorithm, inner_state):
    """A head keeps its weights and its moments while other tasks have their turn."""
    model = Heads()
    twin = deepcopy(model)
    settings = SETTINGS | {"algorithm": algorithm, "inner_state": inner_state}
    settings["inner_optimizer"] = OPTIMIZERS[name]
    torch.manual_seed(1)
    Koi(model, **settings).train(Alternating())
    torch.manual_seed(1)
    naive.meta_train(twin, Alternating(), **settings)
    assert_close(model, twin)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *itertools.product(OPTIMIZERS, ["reptile", "fomaml"]),
        *itertools.product(["sgd with weight decay", "momentum", "adam"], ["maml"]),
    ],
)
def test_different_heads_in_one_meta_batch(name, algorithm):
    model = Heads()
    unused = deepcopy(model.heads[2])
    optimizer = OPTIMIZERS[name]
    settings = SETTINGS | {"meta_batch_size": 4, "step_size": 0.01, "meta_step_size": 0.1}
    koi = Koi(model, inner_optimizer=optimizer, algorithm=algorithm, **settings)
    before = deepcopy(model)
    koi.train(Alternating())
    assert_same(model.heads[2], unused)
    assert all(
        bool((p != q).all()) and bool(p.isfinite().all())
        for part in ("trunk", "heads.0", "heads.1")
        for p, q in zip(
            model.get_submodule(part).parameters(),
            before.get_submodule(part).parameters(),
            strict=True,
        )
    )


def test_update_of_a_head_is_the_mean_over_all_tasks():
    """φ̃ = φ for the tasks that do not use it: two of four give half of their mean update."""
    model = Heads()
    settings = SETTINGS | {"num_iterations": 1}
    tasks = [OneHead(0), OneHead(0), OneHead(1), OneHead(1)]
    ends = [naive.adapt(model, [task] * 3, SGD, 0.05)[0].heads[0].weight for task in tasks[:2]]
    expected = model.heads[0].weight + 0.5 * (sum(ends) / 2 - model.heads[0].weight) / 2

    class Tasks:
        def sample(self):
            return tasks.pop(0)

    Koi(model, meta_batch_size=4, **settings).train(Tasks())
    torch.testing.assert_close(model.heads[0].weight, nn.Parameter(expected.detach()))
