"""What a fast path takes for granted is looked at again: what is changed takes effect at once."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import granted_changes
import koi
import naive
from case_runs import assert_close, tensors
from cases import COMPILED
from engine_toys import ENGINES, Fit, mlp
from granted_changes import CHANGES, OF_TRAINING, Everything, Readings, World
from koi import Koi

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread", "as_it_was"),
    pytest.mark.filterwarnings("ignore:num_steps = 1"),
]

SETTINGS = {
    "step_size": 0.1,
    "num_steps": 2,
    "num_iterations": 4,
    "meta_step_size": 0.5,
    "meta_batch_size": 2,
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
# What the compiler is given is the same for every change; these are traced in earnest each time.
TRACED = ["frozen weight in place", "default argument"]


@pytest.fixture
def as_it_was():
    granted_changes.reset()
    yield
    granted_changes.reset()


def in_every_engine(short):
    """Parametrize by the engines; those that are not in the short form are slow."""
    rest = [pytest.param(e, marks=pytest.mark.slow) for e in ENGINES if e not in short]
    return pytest.mark.parametrize("engine", [*short, *rest])


def learner_of(engine, model, **settings):
    vectorize, compile = ENGINES[engine]
    return Koi(model, vectorize=vectorize, compile=compile, **({"seed": 1} | SETTINGS | settings))


def world_of(learner, tasks):
    return World(learner.model, tasks, partial(setattr, learner))


def curves_of(world, settings):
    """Return the twin's curves of the first tasks."""
    optimizer = settings.get("inner_optimizer", "sgd")
    world.tasks.again()
    return naive.evaluate(
        world.model,
        world.tasks,
        3,
        settings["num_steps"],
        step_size=settings["step_size"],
        inner_optimizer=OPTIMIZERS.get(optimizer, optimizer),
    )


def evaluates_what_is(engine, name):
    """Evaluate, change one thing, evaluate: both times what the twin gives."""
    learner, tasks = learner_of(engine, Everything()), Readings()
    world, curves = world_of(learner, tasks), []
    for change in (None, CHANGES[name]):
        if change is not None:
            change(world)
        settings = {key: getattr(learner, key) for key in (*SETTINGS, "inner_optimizer")}
        expected = curves_of(world, settings)
        tasks.again()
        curves.append(learner.evaluate(tasks, num_tasks=3).losses)
        assert_close(curves[-1].double(), expected, 1e-10)
    assert curves[0].shape != curves[1].shape or not torch.allclose(*curves, rtol=0, atol=1e-9)


def trains_what_is(engine, name):
    """Change one thing in a callback: what the twin gives that is trained in two halves."""
    change = (CHANGES | OF_TRAINING)[name]
    learner, tasks = learner_of(engine, Everything()), Readings()
    twin, its_tasks, settings = deepcopy(learner.model), Readings(), dict(SETTINGS)

    def callback(koi, record):
        if record.iteration == 1:
            change(world_of(koi, tasks))

    learner.train(tasks, callbacks=[callback])
    assert learner.engine == engine
    granted_changes.reset()
    torch.set_default_dtype(torch.float64)
    naive.meta_train(twin, its_tasks, **(settings | {"num_iterations": 2}))
    untouched = deepcopy(twin)
    naive.meta_train(untouched, deepcopy_of(its_tasks), **(settings | {"num_iterations": 2}))
    change(World(twin, its_tasks, settings.__setitem__))
    if "inner_optimizer" in settings:
        settings["inner_optimizer"] = OPTIMIZERS.get(
            settings["inner_optimizer"], settings["inner_optimizer"]
        )
    naive.meta_train(
        twin, its_tasks, **settings | {"num_iterations": settings["num_iterations"] - 2}
    )
    assert_close(tensors(learner.model), tensors(twin), 1e-10)
    with pytest.raises(AssertionError):
        assert_close(tensors(learner.model), tensors(untouched), 1e-9)


def deepcopy_of(tasks):
    """Return a distribution that goes on as ``tasks`` would."""
    other = Readings()
    other.generator.set_state(tasks.generator.get_state())
    return other


@pytest.mark.usefixtures("untraced")
@in_every_engine(["vectorized+compiled"])
@pytest.mark.parametrize("name", CHANGES)
def test_between_two_evaluations(name, engine):
    evaluates_what_is(engine, name)


@pytest.mark.usefixtures("untraced")
@in_every_engine(["vectorized", "compiled"])
@pytest.mark.parametrize("name", CHANGES | OF_TRAINING)
def test_inside_of_one_training(name, engine):
    trains_what_is(engine, name)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", TRACED)
def test_between_two_evaluations_traced(name):
    evaluates_what_is("vectorized+compiled", name)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("name", CHANGES)
def test_between_two_evaluations_traced_in_full(name, engine):
    evaluates_what_is(engine, name)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("name", CHANGES | OF_TRAINING)
def test_inside_of_one_training_traced_in_full(name, engine):
    trains_what_is(engine, name)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("before", ENGINES)
@pytest.mark.parametrize("after", ENGINES)
def test_engine(before, after):
    """vectorize and compile act from the next training on, or from the next meta-iteration."""
    twin = Everything()
    learners = [learner_of(before, deepcopy(twin)) for _ in range(2)]
    naive.meta_train(twin, Readings(), **SETTINGS)

    def change(koi, record=None):
        if record is None or record.iteration == 1:
            koi.vectorize, koi.compile = ENGINES[after]

    tasks = Readings()
    learners[0].num_iterations = 2
    learners[0].train(tasks)
    change(learners[0])
    learners[0].num_iterations = 4
    learners[0].train(tasks)
    learners[1].train(Readings(), callbacks=[change])
    for learner in learners:
        assert learner.engine == after
        assert_close(tensors(learner.model), tensors(twin), 1e-10)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ["vectorized", "vectorized+compiled"])
def test_chunk_size(engine, monkeypatch):
    """No more tasks than that run at once, which the loss sees by how it is mapped."""
    learner, tasks = learner_of(engine, Everything(), meta_batch_size=4), Readings()
    twin = deepcopy(learner.model)
    naive.meta_train(twin, Readings(), **(SETTINGS | {"meta_batch_size": 4}))
    sizes = []
    vmap = torch.func.vmap

    def seen(function, *args, **options):
        mapped = vmap(function, *args, **options)

        def call(*inputs):
            sizes.append(len(torch.utils._pytree.tree_leaves(inputs)[-1]))
            return mapped(*inputs)

        return call

    monkeypatch.setattr("koi.inner.vectorized.vmap", seen)
    monkeypatch.setattr("koi.inner.compiled.functions.vmap", seen)

    def change(koi, record):
        if record.iteration == 1:
            assert max(sizes) == 4
            sizes.clear()
            koi.chunk_size = 2

    learner.train(tasks, callbacks=[change])
    assert max(sizes) == 2
    assert_close(tensors(learner.model), tensors(twin), 1e-10)


class Noisy:
    """Draws from the global generators."""

    def sample(self):
        return Fit(torch.randn(6, 3), torch.randn(6, 2))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ENGINES)
def test_seed(engine):
    learner = learner_of(engine, mlp())
    first = learner.evaluate(Noisy(), num_tasks=3).losses
    learner.seed = 2
    second = learner.evaluate(Noisy(), num_tasks=3).losses
    fresh = learner_of("eager", learner.model, seed=2).evaluate(Noisy(), num_tasks=3).losses
    assert_close(second, fresh, 1e-10)
    assert not torch.allclose(first, second)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine):
    torch.set_default_dtype(torch.float32)
    learner = learner_of(engine, mlp())
    curves = []
    for precision in (None, torch.bfloat16):
        learner.autocast = precision
        curves.append(learner.evaluate(Noisy(), num_tasks=3).losses)
        fresh = learner_of(engine, learner.model, autocast=precision)
        assert torch.equal(curves[-1], fresh.evaluate(Noisy(), num_tasks=3).losses)
    assert not torch.equal(*curves)


class OneBad(Readings):
    """The fourth task has no finite loss."""

    count = 0

    def sample(self):
        task, self.count = super().sample(), self.count + 1
        return task if self.count != 4 else type(task)(task.x, task.y * torch.inf, 1, F.mse_loss)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ENGINES)
def test_on_nonfinite(engine):
    learner = learner_of(engine, Everything(), num_iterations=2)
    twin, tasks = deepcopy(learner.model), Readings()
    learner.train(OneBad(), callbacks=[lambda koi, record: setattr(koi, "on_nonfinite", "skip")])
    assert [record.num_skipped for record in learner.history] == [0, 1]
    for meta_batch_size in (2, 1):
        given = SETTINGS | {"num_iterations": 1, "meta_batch_size": meta_batch_size}
        naive.meta_train(twin, tasks, **given)
    assert_close(tensors(learner.model), tensors(twin), 1e-10)


@dataclass
class Supervised:
    """Tasks with a support set of some size."""

    size: int

    def sample(self):
        generator = torch.Generator().manual_seed(self.size)
        x, y = (torch.randn(self.size, n, generator=generator) for n in (3, 2))
        return koi.SupervisedTask(x, y, x, y, torch.tensor(7), batch_size=10)


@pytest.mark.parametrize(
    ("engine", "fixture"),
    [*((engine, "untraced") for engine in ENGINES), ("compiled", "traced")],
)
def test_support_set_larger_than_the_first(engine, fixture, request):
    """With 5 examples every step sees all of them, with 40 a minibatch of 10."""
    request.getfixturevalue(fixture)
    learner = learner_of(engine, mlp(), num_steps=3)
    for size in (5, 40, 5):
        expected = naive.evaluate(learner.model, Supervised(size), 2, 3, step_size=0.1)
        assert_close(learner.evaluate(Supervised(size), num_tasks=2).losses, expected, 1e-10)
