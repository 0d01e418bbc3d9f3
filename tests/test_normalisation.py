"""BatchNorm of many tasks in one operation is each task's own BatchNorm."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from engine_toys import ALGORITHMS, Fits, assert_agree, trained
from koi.inner.layers.normalisation import JoinedNorm, map_normalisation

pytestmark = pytest.mark.usefixtures("float64")
TASKS = 3


def naive(input, weight, bias):
    return F.batch_norm(input, None, None, weight, bias, training=True, eps=1e-3)


def joined(input, weight, bias):
    return JoinedNorm.apply(input, weight, bias, 1e-3)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 0, 1), (2, 0, 0), (0, None, 0), (None, 0, None)])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 2, 3)])
def test_each_task(shape, dims):
    """Values, gradients and a gradient of these, wherever the tasks are."""
    own = [shape, (4,), (4,)]
    tensors = [
        torch.randn(size if dim is None else (*size[:dim], TASKS, *size[dim:])).requires_grad_()
        for size, dim in zip(own, dims, strict=True)
    ]

    def one_by_one(*tensors):
        rows = [
            [t if d is None else t.select(d, task) for t, d in zip(tensors, dims, strict=True)]
            for task in range(TASKS)
        ]
        return torch.stack([naive(*row) for row in rows])

    results, direction = [], torch.randn(TASKS, *shape)
    for function in (vmap(joined, dims), one_by_one):
        output = function(*tensors)
        grads = torch.autograd.grad((output.sin() * direction).sum(), tensors, create_graph=True)
        total = sum(g.sin().sum() for g in grads)
        results.append([output, *grads, *torch.autograd.grad(total, tensors)])
    torch.testing.assert_close(*results)


def test_loss_that_takes_gradients_itself():
    tensors = torch.randn(TASKS, 6, 4), torch.randn(TASKS, 4), torch.randn(TASKS, 4)
    results = []
    for function in (joined, naive):

        def loss(*tensors, function=function):
            return function(*tensors).sin().sum()

        results.append(vmap(grad(loss, argnums=(0, 1, 2)))(*tensors))
    torch.testing.assert_close(*results)


def test_input_of_the_wrong_shape_is_refused_as_before():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    map_normalisation(norm, autocast=False, join=True)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(6, 4))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_training(algorithm):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)
    )
    settings = {"algorithm": algorithm, "inner_optimizer": "adam"}
    eager, together = (
        trained(engine, net, Fits((1, 3, 2)), **settings) for engine in ("eager", "vectorized")
    )
    assert_agree(together, eager)
