"""evaluate gives the same curves in every engine and leaves φ alone; dropout; lower precision."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koi
from engine_toys import (
    ENGINES,
    FAST,
    NETS,
    OPTIMIZERS,
    SETTINGS,
    Fit,
    Fits,
    assert_agree,
    everything,
    mlp,
    moved,
    trained,
)
from koi import Koi, TaskError
from koi.randomness import capture, same_states

pytestmark = pytest.mark.usefixtures("untraced")


@cache
def eager_of(net, optimizer):
    """Return a network and what the eager engine makes of it, once for all others."""
    make, shape = NETS[net]
    model = make()
    return model, trained("eager", model, Fits(shape), **OPTIMIZERS[optimizer])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", FAST)
def test_curves(engine, optimizer, net):
    tasks = Fits(NETS[net][1])
    model, one_by_one = eager_of(net, optimizer)
    learners = one_by_one, trained(engine, model, tasks, **OPTIMIZERS[optimizer])
    before = [deepcopy(everything(learner)) for learner in learners]
    for num_steps in (None, 0, 1, 2, 7):
        eager, other = (learner.evaluate(tasks, 5, num_steps).losses for learner in learners)
        assert other.shape == (5, SETTINGS["num_steps"] + 1 if num_steps is None else num_steps + 1)
        torch.testing.assert_close(other, eager, rtol=0, atol=1e-10)
        assert num_steps == 0 or not torch.equal(other[:, 0], other[:, -1])
    for learner, state in zip(learners, before, strict=True):
        torch.testing.assert_close(everything(learner), state, rtol=0, atol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_metric_sees_the_adapted_module(engine, net):
    """The query loss as a metric is the last column of the curves; chunks and 0 steps included."""
    make, shape = NETS[net]
    tasks = Fits(shape)
    learner = trained(engine, make(), tasks, chunk_size=2)
    before = deepcopy(everything(learner))
    for num_steps in (None, 0, 1):
        curves = learner.evaluate(tasks, 5, num_steps).losses
        losses = learner.measure(tasks, lambda model, task: task.query.loss(model), 5, num_steps)
        torch.testing.assert_close(losses, curves[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(everything(learner), before, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_metric_may_do_what_the_engine_cannot(engine):
    """It is called outside of vmap and of the compiled graph, on tensors of one task."""
    learner = trained(engine, mlp(), Fits())

    def metric(model, task):
        assert type(model) is type(learner.model)
        assert model is not learner.model
        assert not model(task.x).requires_grad
        return torch.tensor([1.0, 2.0]) if task.y.sum().item() > 0 else torch.zeros(2)

    assert learner.measure(Fits(), metric, num_tasks=3).shape == (3, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_metric_that_is_no_tensor_is_refused(engine):
    learner = trained(engine, mlp(), Fits())
    with pytest.raises(TaskError, match="metric returned float"):
        learner.measure(Fits(), lambda model, task: task.query.loss(model).item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("engine", FAST)
def test_evaluation_in_evaluation_mode(engine):
    """BatchNorm then uses φ's running statistics, and no task moves them."""
    make, shape = NETS["conv"]
    tasks, start = Fits(shape), make()
    curves = []
    for name in ("eager", engine):
        learner = trained(name, start, tasks)
        learner.model.eval()
        curves.append(learner.evaluate(tasks, 5).losses)
        assert not learner.model.training
        learner.model.train()
        assert not torch.allclose(curves[-1], learner.evaluate(tasks, 5).losses)
    torch.testing.assert_close(*curves, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("engine", ENGINES)
def test_training_does_not_see_an_evaluation(engine):
    start, tasks = mlp(), Fits()
    plain = trained(engine, start, tasks, inner_optimizer="adam")
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | {"inner_optimizer": "adam"}
    learner = Koi(deepcopy(start), vectorize=vectorize, compile=compile, **settings)
    learner.evaluate(tasks, 4)
    before = capture()
    learner.train(tasks, callbacks=[lambda learner, record: learner.evaluate(tasks, 4, 2)])
    assert same_states(before, capture())
    assert_agree(learner, plain, tolerance=0)


class Dropped(nn.Module):
    """w times a mask of ones and zeros, and of 1 / (1 − p)."""

    def __init__(self, size=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.dropout(self.weight.expand_as(x))


@koi.tensor_task
@dataclass
class Sum:
    """The gradient of each weight is whether it was kept, over 1 − p."""

    x: torch.Tensor

    def loss(self, model):
        return model(self.x).sum()


class Sums:
    def __init__(self, size):
        self.size = size

    def sample(self):
        return Sum(torch.zeros(self.size))


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout(engine):
    """How often a weight is kept, over steps, tasks and weights, is binomial, and no two alike."""
    size, num_tasks, num_steps, num_iterations = 200, 4, 2, 10
    settings = {"meta_batch_size": num_tasks, "num_steps": num_steps, "step_size": 1.0}
    settings |= {"num_iterations": num_iterations, "meta_step_size": 1.0, "seed": 3}
    learner = trained(engine, Dropped(size), Sums(size), **settings)
    # φ falls by 1 / 0.7 for each time that a weight is kept, on average over the tasks
    kept = (1 - learner.model.weight.detach()) * 0.7 * num_tasks
    trials = num_tasks * num_steps * num_iterations
    assert torch.allclose(kept, kept.round(), atol=1e-2)
    mean, deviation = trials * 0.7, (trials * 0.7 * 0.3) ** 0.5
    # six standard errors. Did tasks, or steps, share a mask, the spread would be 2 or 1.4 as large
    assert abs(kept.mean() - mean) < 6 * deviation / size**0.5
    assert abs(kept.std() / deviation - 1) < 6 / (2 * size) ** 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_of_different_tasks(engine):
    """One evaluation of one step: the loss before it is each task's own number of weights kept."""
    vectorize, compile = ENGINES[engine]
    learner = Koi(Dropped(200), vectorize=vectorize, compile=compile, num_steps=2, seed=0)
    losses = learner.evaluate(Sums(200), num_tasks=20).losses
    assert len(set(losses[:, 0].tolist())) > 8
    assert len(set((losses[:, 1] - losses[:, 0]).tolist())) > 8


def test_the_engine_is_that_of_the_last_call():
    learner = Koi(mlp(), seed=0)
    for call, engine in (
        (lambda: learner.evaluate(Fits(), 3), "vectorized"),
        (lambda: learner.adapt(Fits().sample()), "eager"),
        (lambda: learner.measure(Fits(), lambda model, task: torch.ones(()), 3), "vectorized"),
    ):
        call()
        assert learner.engine == engine


PRECISIONS = set()


class Watching(nn.Module):
    """Says in which precision its product is."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        product = self.layers(x)
        PRECISIONS.add(product.dtype)
        return product.float()


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16(engine, algorithm):
    PRECISIONS.clear()
    start = Watching()
    full, half = (
        trained(engine, start, Fits(), algorithm=algorithm, num_iterations=8, autocast=dtype)
        for dtype in (None, torch.bfloat16)
    )
    assert {torch.float32, torch.bfloat16} == PRECISIONS
    assert moved(half, start)
    values = everything(half)[0].values()
    assert {value.dtype for value in values} == {torch.float32}
    way = [p - q for p, q in zip(full.model.parameters(), start.parameters(), strict=True)]
    off = [p - q for p, q in zip(half.model.parameters(), full.model.parameters(), strict=True)]
    error, length = (torch.cat([t.detach().flatten() for t in ts]).norm() for ts in (off, way))
    assert 0 < error < 0.05 * length
    losses = half.evaluate(Fits(), 3).losses
    torch.testing.assert_close(losses, full.evaluate(Fits(), 3).losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("engine", FAST)
def test_convolution_in_bfloat16(engine):
    make, shape = NETS["conv"]
    start = make()
    full, half = (
        trained(engine, start, Fits(shape), autocast=dtype) for dtype in (None, torch.bfloat16)
    )
    for one, other in zip(half.model.parameters(), full.model.parameters(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("engine", FAST)
def test_derivative_of_the_model_inside_the_loss(engine):
    """As in physics, with an affine normalisation, of which torch has second derivatives wrong
    where vmap stands between them."""

    class Slope(Fit):
        def loss(self, model):
            slope = torch.func.grad(lambda x: model(x).sum())(self.x)
            return F.mse_loss(slope[:, :2], self.y)

    koi.tensor_task(Slope)
    start = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    eager, other = (trained(name, start, Fits(kind=Slope)) for name in ("eager", engine))
    assert_agree(other, eager)
