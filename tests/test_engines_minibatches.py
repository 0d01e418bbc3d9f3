"""Minibatches and sampling: every engine sees the same tasks, and the same part at each step."""

import random
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import koi
from engine_toys import ENGINES, FAST, SETTINGS, Fit, Fits, assert_agree, mlp, trained
from koi import EngineError, Koi, TaskError
from koi.problems import Sines
from koi.tasks import stack

pytestmark = pytest.mark.usefixtures("float64", "untraced")
COMPILED = ["compiled", "vectorized+compiled"]


@koi.tensor_task
@dataclass
class Drawn(Fit):
    """Each inner step sees three examples, drawn by torch."""

    @property
    def query(self):
        return Fit(self.x, self.y)

    def rows(self):
        return torch.randperm(len(self.x))[:3]

    def minibatches(self, num_steps):
        for _ in range(num_steps):
            rows = self.rows()
            yield Fit(self.x[rows], self.y[rows])


@koi.tensor_task
@dataclass
class DrawnByPython(Drawn):
    def rows(self):
        return torch.tensor(random.sample(range(len(self.x)), 3))


@koi.tensor_task
@dataclass
class DrawnByNumpy(Drawn):
    def rows(self):
        return torch.from_numpy(np.random.permutation(len(self.x))[:3].copy())


@koi.tensor_task
@dataclass
class Endless(Fit):
    def minibatches(self, num_steps):
        step = 0
        while True:
            rows = [step % len(self.x), (step + 2) % len(self.x)]
            yield Fit(self.x[rows], self.y[rows])
            step += 1


@koi.tensor_task
@dataclass
class Short(Fit):
    def minibatches(self, num_steps):
        return [self] * (num_steps - 1)


@koi.tensor_task
@dataclass
class Ragged(Fit):
    """The last minibatch is what is left of six examples after steps of four."""

    def minibatches(self, num_steps):
        for step in range(num_steps):
            rows = slice(0, 4) if step % 2 == 0 else slice(4, 6)
            yield Fit(self.x[rows], self.y[rows])


@koi.tensor_task
@dataclass
class Kinds(Fit):
    """The minibatches are of two classes."""

    def minibatches(self, num_steps):
        for step in range(num_steps):
            yield (Fit if step % 2 == 0 else Endless)(self.x, self.y)


@cache
def one_by_one(kind, algorithm):
    """Return a network and what the eager engine makes of it, once for all others."""
    model = mlp()
    return model, trained("eager", model, Fits(kind=kind), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("kind", [Drawn, DrawnByPython, DrawnByNumpy, Endless])
@pytest.mark.parametrize("engine", FAST)
def test_minibatches(engine, kind, algorithm):
    tasks = Fits(kind=kind)
    model, eager = one_by_one(kind, algorithm)
    other = trained(engine, model, tasks, algorithm=algorithm)
    assert_agree(other, eager)
    curves = [learner.evaluate(tasks, 5, num_steps=4).losses for learner in (eager, other)]
    torch.testing.assert_close(*curves, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_has_draws_of_its_own(engine):
    """Were the first draw used again, the loss would be that of always the same examples."""
    seen = []

    @koi.tensor_task
    @dataclass
    class Task(Drawn):
        def rows(self):
            seen.append(super().rows())
            return seen[-1]

    trained(engine, mlp(), Fits(kind=Task), num_iterations=10)
    assert len({tuple(rows.tolist()) for rows in seen}) > 40  # of 120


@pytest.mark.parametrize("engine", ENGINES)
def test_too_few(engine):
    with pytest.raises(TaskError, match=r"minibatches\(3\) of Short gave 2"):
        trained(engine, mlp(), Fits(kind=Short))


@pytest.mark.parametrize("kind", [Ragged, Kinds])
def test_minibatches_that_differ(kind):
    model = mlp()
    eager, other = (trained(name, model, Fits(kind=kind)) for name in ("eager", "vectorized"))
    assert_agree(other, eager)
    for engine in COMPILED:
        with pytest.raises(EngineError, match=rf"minibatches of {kind.__name__} differ in class"):
            trained(engine, model, Fits(kind=kind))


class Together(Fits):
    """Draws all tasks with one operation for each field, and nothing alone."""

    def sample(self):
        raise AssertionError("sample_batch is there")

    def sample_batch(self, num_tasks):
        self.asked = [*getattr(self, "asked", []), num_tasks]
        return Fit(torch.randn(num_tasks, 6, 3), torch.randn(num_tasks, 6, 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_sample_batch(engine):
    model, tasks = mlp(), Together()
    learner = trained(engine, model, tasks)
    assert tasks.asked == [SETTINGS["meta_batch_size"]] * SETTINGS["num_iterations"]
    losses = learner.evaluate(tasks, num_tasks=230).losses
    assert sum(tasks.asked) - 12 == 230
    eager = trained("eager", model, Together())
    assert_agree(learner, eager)
    torch.testing.assert_close(losses, eager.evaluate(Together(), 230).losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_tasks_in_each_engine(engine):
    """Seen through the tasks themselves, not through what training makes of them."""

    class Spied(Fits):
        def __init__(self):
            super().__init__()
            self.seen = []

        def sample(self):
            self.seen.append(super().sample())
            return self.seen[-1]

    one, other = Spied(), Spied()
    trained("eager", mlp(), one)
    torch.manual_seed(99)  # what the generators hold does not matter
    trained(engine, mlp(), other)
    assert len(one.seen) == len(other.seen) == 12
    assert all(torch.equal(a.x, b.x) for a, b in zip(one.seen, other.seen, strict=True))
    assert len({task.x.sum().item() for task in one.seen}) == 12


@pytest.mark.parametrize("batch_size", [4, 10, None])
@pytest.mark.parametrize("engine", FAST)
def test_ready_tasks(engine, batch_size):
    """Waves, several passes through ten points: the order of the later ones is theirs, too."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    waves = Sines(num_points=10, batch_size=batch_size or 10)
    settings = {"num_steps": 6, "inner_optimizer": "adam"}
    eager, other = (trained(name, model, waves, **settings) for name in ("eager", engine))
    assert_agree(other, eager)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_tasks_of_different_shapes_one_by_one(engine):
    class Growing(Fits):
        def sample(self):
            size = int(torch.randint(4, 7, ()))
            return Fit(torch.randn(size, 3), torch.randn(size, 2))

    model = mlp()
    assert_agree(trained(engine, model, Growing()), trained("eager", model, Growing()))


def test_tasks_are_not_changed():
    tasks = [Fits().sample() for _ in range(3)]
    before = deepcopy(tasks)

    class Given:
        def __init__(self):
            self.left = tasks * 4

        def sample(self):
            return self.left.pop()

    for engine in ENGINES:
        trained(engine, mlp(), Given())
    after = stack(tasks)
    for name in ("x", "y", "query_x", "query_y"):
        assert torch.equal(getattr(after, name), getattr(stack(before), name))


def test_learning_on_the_fly_needs_nothing_of_the_task_but_its_tensors():
    """`__init__` of a task is not called again for what Koi makes of it."""

    @koi.tensor_task
    @dataclass
    class Counted(Fit):
        made = 0

        def __post_init__(self):
            type(self).made += 1
            assert isinstance(self.x, Tensor)

    Koi(mlp(), **SETTINGS, vectorize=True).train(Fits(kind=Counted))
    assert Counted.made == 12
