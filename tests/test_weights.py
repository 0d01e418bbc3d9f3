"""A task's weight counts in every mean of its meta-batch: what φ learns, and the record."""

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import koi
import naive
from engine_toys import ENGINES, Fit
from koi import Koi, SupervisedTask
from koi.errors import TaskError
from toys import InTurn, Point, Quadratic, Regression, snapshot


@koi.tensor_task
@dataclass
class Weighted(Fit):
    weight: Tensor


class Weights:
    """Random tasks whose weights come in turn."""

    def __init__(self, *weights):
        self.weights = InTurn(*weights)

    def sample(self):
        weight = torch.as_tensor(self.weights.sample())
        return Weighted(torch.randn(6, 3), torch.randn(6, 2), weight)


class Counting(nn.Module):
    """Keeps, as an integer, something of what it saw last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.last.copy_((1000 * x.detach().sum()).long())
        return self.layer(x)


def quadratic(centre, weight):
    task = Quadratic(centre)
    task.weight = weight
    return task


def test_by_hand():
    """One step at rate 1 takes w to the centre; φ goes half of the way to (3·1 + 1·5) / 4 = 2."""
    tasks = InTurn(quadratic([1.0], 3), quadratic([5.0], torch.tensor(1.0)))
    learner = Koi(Point(0.0), 1.0, 2, 1, meta_step_size=0.5, meta_batch_size=2)
    learner.train(tasks)
    assert learner.model.weight.item() == 1.0
    record = learner.history[0]
    assert record.loss_before == (3 * 0.5 + 1 * 12.5) / 4
    assert (record.loss_after, record.meta_gradient_norm) == (0.0, 2.0)


@pytest.mark.parametrize("kind", [int, float, np.float32, torch.tensor])
def test_equal_weights_change_nothing(kind):
    points = []
    for weights in [(None, None), (kind(7), kind(7)), (None, kind(1))]:
        tasks = InTurn(*map(quadratic, ([1.0], [5.0]), weights))
        learner = Koi(Point(0.0), 0.5, 2, 3, meta_step_size=0.5, meta_batch_size=2)
        learner.train(tasks)
        points.append(learner.model.weight.item())
    assert points == pytest.approx([points[0]] * 3, rel=1e-6)


@pytest.mark.usefixtures("float64", "untraced")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_weight_0_counts_nowhere(engine, chunk_size):
    """Neither in φ nor in the record, nor as the last task, whose integers buffers become."""
    torch.manual_seed(0)
    given = {"step_size": 0.1, "num_steps": 2, "num_iterations": 2, "meta_step_size": 0.5}
    given |= {"meta_batch_size": 4}
    model = Counting()
    twin = Counting()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    momentum = partial(torch.optim.SGD, momentum=0.9)
    naive.meta_train(twin, Weights(2.0, 0.5, 0.0, 0.0), inner_optimizer=momentum, **given)
    torch.manual_seed(1)
    vectorize, compile = ENGINES[engine]
    given |= {"vectorize": vectorize, "compile": compile, "chunk_size": chunk_size}
    learner = Koi(model, inner_optimizer=momentum, **given)
    learner.train(Weights(2.0, 0.5, 0.0, 0.0))
    assert learner.engine == engine
    assert learner.history[0].num_skipped == 0
    torch.testing.assert_close(snapshot(model), snapshot(twin), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64", "untraced")
@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_tasks_do_not_count(engine):
    """What is left is the mean of the others, by their weights."""
    x, y = torch.randn(3, 6, 3), torch.randn(3, 6, 2)
    first, broken, last = map(Weighted, x, y, torch.tensor([1.0, 9.0, 2.0]))
    broken.x = broken.x * math.nan
    vectorize, compile = ENGINES[engine]
    start, learners = nn.Linear(3, 2), []
    for tasks in [(first, broken, last), (first, last)]:
        settings = {"vectorize": vectorize, "compile": compile, "on_nonfinite": "skip"}
        settings |= {"meta_step_size": 0.5, "meta_batch_size": len(tasks)}
        learners.append(Koi(deepcopy(start), 0.1, 2, 1, **settings))
        learners[-1].train(InTurn(*tasks))
        assert learners[-1].history[0].num_skipped == len(tasks) - 2
    models = [snapshot(learner.model) for learner in learners]
    torch.testing.assert_close(*models, rtol=0, atol=1e-12)
    assert learners[0].history[0].loss_before == pytest.approx(learners[1].history[0].loss_before)


def test_property_of_a_task():
    """Which is one task's, not that of many in one."""

    @koi.tensor_task
    @dataclass
    class BySize(Fit):
        @property
        def weight(self):
            return float(self.x[:, 0].abs().sum() > 2)

    x, y = torch.ones(2, 3, 3), torch.randn(2, 3, 2)
    x[1] /= 10
    models = []
    for vectorize in (False, True):
        torch.manual_seed(0)
        learner = Koi(nn.Linear(3, 2), 0.1, 2, 1, meta_batch_size=2, vectorize=vectorize)
        learner.train(InTurn(*map(BySize, x, y)))
        models.append(learner.model)
    torch.testing.assert_close(*map(snapshot, models))
    torch.manual_seed(0)
    alone = Koi(nn.Linear(3, 2), 0.1, 2, 1)
    alone.train(InTurn(BySize(x[0], y[0])))
    torch.testing.assert_close(snapshot(alone.model), snapshot(models[0]))


def test_supervised_tasks_have_one():
    x, y, key = torch.randn(6, 3), torch.randn(6, 2), torch.tensor(0)
    tasks = [SupervisedTask(x, y, x, y, key, weight=torch.tensor(w)) for w in (1.0, 3.0)]
    assert koi.stack(tasks).weight.tolist() == [1.0, 3.0]
    learner = Koi(nn.Linear(3, 2), meta_batch_size=2, num_iterations=1, vectorize=True)
    learner.train(InTurn(*tasks))


WRONG = [-1.0, math.nan, math.inf, 1e30, 1e-30, "2", torch.ones(2), 1j, torch.tensor(math.nan)]


@pytest.mark.parametrize("weight", WRONG, ids=str)
def test_what_is_no_weight_is_refused(weight):
    start, tasks = Point(0.0), InTurn(quadratic([1.0], 1), quadratic([2.0], weight))
    learner = Koi(start, num_steps=2, meta_batch_size=2)
    with pytest.raises(TaskError, match=r"task 1 of meta-iteration 0 has a weight .*: what a task"):
        learner.train(tasks)
    assert (learner.iteration, start.weight.item()) == (0, 0.0)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_zeros_is_refused(engine):
    vectorize, compile = ENGINES[engine]
    learner = Koi(nn.Linear(3, 2), meta_batch_size=2, vectorize=vectorize, compile=compile)
    before = snapshot(learner.model)
    with pytest.raises(TaskError, match="all tasks of meta-iteration 0 have weight 0"):
        learner.train(Weights(0.0))
    assert learner.iteration == 0
    torch.testing.assert_close(snapshot(learner.model), before, rtol=0, atol=0)


def test_class_weights_under_this_name_are_noticed():
    task = Regression(torch.randn(6, 3), torch.randn(6, 2))
    task.weight = torch.ones(2)
    with pytest.raises(TaskError, match=r"has a weight of shape \(2,\): .* rename it"):
        Koi(nn.Linear(3, 2)).train(InTurn(task))


def test_evaluation_takes_every_task_once():
    tasks = InTurn(quadratic([1.0], 1e6), quadratic([3.0], 1))
    assert Koi(Point(0.0)).evaluate(tasks, num_tasks=2, num_steps=0).before == (0.5 + 4.5) / 2
