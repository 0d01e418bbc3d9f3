"""What is compiled is compiled once, and never serves what it was not compiled for."""

import logging
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.codegen.cpp import CppScheduling

import koi
from engine_toys import (
    ENGINES,
    SETTINGS,
    Fit,
    Fits,
    assert_agree,
    conv,
    mlp,
    trained,
)
from koi import Koi
from koi.inner.compiled.torch_internals import kernels_apart

pytestmark = pytest.mark.usefixtures("float64", "traced")
COMPILED = ["compiled", "vectorized+compiled"]
ONE = ["compiled", pytest.param("vectorized+compiled", marks=pytest.mark.slow)]
FACTOR = 1.0


def learner_of(engine, model, **settings):
    vectorize, compile = ENGINES[engine]
    return Koi(deepcopy(model), vectorize=vectorize, compile=compile, **(SETTINGS | settings))


def graphs():
    return counters["stats"]["unique_graphs"]


def both(engine, model, **settings):
    """Return a compiled learner and an eager one."""
    return [learner_of(name, model, **settings) for name in (engine, "eager")]


@koi.tensor_task
@dataclass
class Steps(Fit):
    """Another minibatch at each step, as many as are asked for."""

    @property
    def query(self):
        return Fit(self.x, self.y)

    def minibatches(self, num_steps):
        for step in range(num_steps):
            rows = [step % 6, (step + 1) % 6, (5 * step) % 6]
            yield Fit(self.x[rows], self.y[rows])


@pytest.mark.parametrize("kind", [pytest.param(Fit, marks=pytest.mark.slow), Steps])
@pytest.mark.parametrize("engine", COMPILED)
def test_nothing_is_compiled_twice(engine, kind):
    tasks = Fits(kind=kind)
    learner, eager = both(engine, mlp(), inner_optimizer="adam", num_iterations=1)
    learner.train(tasks)
    before = graphs()
    assert before > 0
    learner.num_iterations = 4
    learner.train(tasks)
    learner.num_iterations = 6
    learner.train(tasks)
    assert graphs() == before
    eager.num_iterations = 6
    eager.train(tasks)
    curves = [[each.evaluate(tasks, 4, num_steps=5).losses for each in (learner, eager)]]
    # the query loss; one task's inner step serves both, that of so many others is another
    compiled = before + (1 if engine == "compiled" else 2)
    assert graphs() == compiled
    for num_tasks, num_steps in [(4, 5), (4, 2), (2, 3), (9, 4), (1, 9), (4, 30)]:
        curves.append(
            [each.evaluate(tasks, num_tasks, num_steps).losses for each in (learner, eager)]
        )
    learner.evaluate(tasks)
    assert graphs() == compiled
    for pair in curves:
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)
    learner.num_iterations = 8
    learner.train(tasks)
    assert graphs() == compiled


@koi.tensor_task
@dataclass
class TaskFirst(Fit):
    """Sees itself in the first step, and its mirror image in the others."""

    def minibatches(self, num_steps):
        yield self
        for _ in range(1, num_steps):
            yield TaskFirst(-self.x, self.y)


@pytest.mark.parametrize("engine", ONE)
def test_a_view_that_is_the_task_itself(engine):
    """The compiler makes one input of what is one object when it compiles."""
    model, tasks = mlp(), Fits(kind=TaskFirst)
    assert_agree(trained(engine, model, tasks), trained("eager", model, tasks))


def test_evaluation_after_no_step_and_one():
    tasks = Fits()
    learner, eager = both("compiled", mlp())
    for num_steps in (1, 0):
        curves = [each.evaluate(tasks, 3, num_steps).losses for each in (learner, eager)]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-10)
    before = graphs()
    for num_steps in (0, 1):
        learner.evaluate(tasks, 3, num_steps)
    assert graphs() == before


def test_modes():
    """Training and evaluation are each compiled for what mode the module is in."""
    tasks = Fits((1, 4, 4))
    learners = both("compiled", conv(), num_iterations=2)
    for learner in learners:
        learner.train(tasks)
        learner.model.eval()
        learner.num_iterations = 4
        learner.train(tasks)
    assert_agree(*learners)
    before = graphs()
    for learner in learners:
        learner.model.train()
        learner.num_iterations = 6
        learner.train(tasks)
    assert graphs() == before
    assert_agree(*learners)


class UsesFactor(Fit):
    def loss(self, model):
        return FACTOR * super().loss(model)


koi.tensor_task(UsesFactor)


@pytest.mark.parametrize("engine", ONE)
def test_global_constants(engine, monkeypatch):
    tasks = Fits(kind=UsesFactor)
    learners = both(engine, mlp(), num_iterations=2)
    for learner in learners:
        monkeypatch.setitem(globals(), "FACTOR", 1.0)
        learner.train(tasks)
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
        learner.num_iterations = 4
        learner.train(tasks)
    assert_agree(*learners)


class Scaled(nn.Module):
    """Has an attribute that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = mlp(), 1.0

    def forward(self, x):
        return self.scale * self.layers(x)


def scale(model):
    model.scale = 3.0


def freeze(model):
    model.layers[0].requires_grad_(False)


def overwrite(model):
    with torch.no_grad():
        model.layers[2].weight.fill_(0.5)


def replace(model):
    model.layers[1] = nn.ReLU()


CHANGES = [scale, freeze, overwrite, replace]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_module_between_trainings(change):
    tasks = Fits()
    learners = both("compiled", Scaled(), num_iterations=2)
    for learner in learners:
        learner.train(tasks)
        change(learner.model)
        learner.num_iterations = 4
        learner.train(tasks)
    assert_agree(*learners)


@pytest.mark.parametrize("engine", ONE)
def test_learners_do_not_share_graphs(engine):
    """Same module, same shapes, same code, one after the other and in turns."""
    model, tasks = mlp(), Fits()
    first = learner_of(engine, model, num_iterations=2)
    first.train(tasks)
    for other in ({"step_size": 0.1}, {"inner_optimizer": partial(torch.optim.SGD, momentum=0.5)}):
        assert_agree(
            trained(engine, model, tasks, **other), trained("eager", model, tasks, **other)
        )
    first.num_iterations = 4
    first.train(tasks)
    assert_agree(first, trained("eager", model, tasks))


def test_a_graph_outlives_a_reset_of_the_compiler():
    tasks = Fits()
    learners = both("compiled", mlp(), num_iterations=2)
    for learner in learners:
        learner.train(tasks)
        torch._dynamo.reset()
        learner.num_iterations = 4
        learner.train(tasks)
    assert_agree(*learners)


def test_a_compiler_that_the_user_disabled(monkeypatch):
    monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", 64)
    model = mlp()
    with torch.compiler.set_stance("force_eager"):
        assert_agree(*(trained(name, model, Fits()) for name in ("compiled", "eager")))


@koi.tensor_task
@dataclass
class Weighted(Fit):
    """With settings: a number, and one that has no hash."""

    weight: float = 1.0
    powers: list = field(default_factory=lambda: [1, 2])

    def loss(self, model):
        error = (model(self.x) - self.y).abs()
        return self.weight * sum((error**power).mean() for power in self.powers)


class Weights(Fits):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def sample(self):
        return Weighted(torch.randn(6, 3), torch.randn(6, 2), **self.settings)


def test_settings_of_tasks():
    learners = both("compiled", mlp(), num_iterations=2)
    for learner in learners:
        learner.train(Weights())
        learner.num_iterations = 4
        learner.train(Weights(weight=3.0))
        learner.num_iterations = 6
        learner.train(Weights(powers=[2, 4]))
    assert_agree(*learners)


@pytest.mark.parametrize("engine", COMPILED)
def test_message(engine, caplog):
    caplog.set_level(logging.INFO, "koi")
    what = {"compiled": "one task", "vectorized+compiled": "all tasks at once"}[engine]
    trained(engine, mlp(), Fits())
    lines = [record.getMessage() for record in caplog.records if record.name == "koi"]
    assert lines[0].startswith(f"compiling an inner step of {what}")
    assert lines[1].startswith("compiled in")
    assert len(lines) == 2


def test_the_compiler_is_left_as_it_was():
    before = CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
    with kernels_apart():
        assert CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM == 0
    with pytest.raises(KeyboardInterrupt), kernels_apart():
        raise KeyboardInterrupt
    assert CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM == before > 0
