"""Tasks of different sizes at once: what they give one by one, or a named refusal."""

import re
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koi
import naive
from engine_toys import ALGORITHMS, ENGINES, everything
from koi import Koi, RaggedTask, SupervisedTask
from koi.errors import ConfigurationError, EngineError, TaskError
from koi.ragged import cycled_order_of_some
from koi.supervised import cycled_order
from toys import InTurn, snapshot

SIZES = [(3, 2, 2), (7, 4, 3), (5, 6, 4)]  # examples, queries, ways of three tasks
SETTINGS = {"step_size": 0.1, "num_steps": 4, "num_iterations": 2, "meta_step_size": 0.5}
SETTINGS |= {"meta_batch_size": 3}


class Naive:
    """The same task as a user would write it by hand, one by one."""

    def __init__(self, task):
        self.task = task

    def loss(self, model):
        given = model(self.task.support_inputs)
        if self.task.num_ways is not None:
            given = given[:, : self.task.num_ways]
        return self.task.criterion(given, self.task.support_targets)

    def minibatches(self, num_steps):
        return [Naive(view) for view in SupervisedTask.minibatches(self.task, num_steps)]

    @property
    def query(self):
        return Naive(self.task.query)


class Ragged:
    """Tasks of three sizes in turn, from a generator of their own."""

    def __init__(self, shape=(3,), ways=True, batch_size=None, wrap=lambda task: task, seed=0):
        self.shape, self.ways, self.wrap = shape, ways, wrap
        self.more = {"batch_size": batch_size}
        self.generator, self.sizes = torch.Generator().manual_seed(seed), InTurn(*SIZES)

    def sample(self):
        sizes = self.sizes.sample()
        support, query = (self.data(n, sizes[2]) for n in sizes[:2])
        key = torch.randint(2**40, (), generator=self.generator)
        more = {"criterion": F.cross_entropy, "num_ways": sizes[2]} if self.ways else {}
        return self.wrap(RaggedTask(*support, *query, key, **more, **self.more))

    def data(self, n, ways):
        x = torch.randn(n, *self.shape, generator=self.generator)
        if self.ways:
            return x, torch.randint(ways, (n,), generator=self.generator)
        return x, torch.randn(n, 4, generator=self.generator)


def around(middle):
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 4))


def wide(middle):
    layers = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False), middle, nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 4))


MODELS = {
    "mlp": (lambda: around(nn.Identity()), (3,)),
    "layer norm": (lambda: around(nn.LayerNorm(4)), (3,)),
    "batch norm": (lambda: wide(nn.BatchNorm2d(2)), (1, 4, 4)),
    "by the batch alone": (lambda: wide(nn.BatchNorm2d(2, track_running_stats=False)), (1, 4, 4)),
    "of vectors, averaged": (
        lambda: around(nn.BatchNorm1d(4, momentum=None, affine=False)),
        (3,),
    ),
    "evaluation mode": (lambda: wide(nn.BatchNorm2d(2)).eval(), (1, 4, 4)),
}


MOMENTUM = {"inner_optimizer": partial(torch.optim.SGD, momentum=0.9)}


def cases():
    """Every model where all run at once, one in every engine, and every algorithm."""
    for model in MODELS:
        yield model, "vectorized", 4, "reptile"
    for engine in ENGINES:
        yield "mlp", engine, 4, "reptile"
    yield "batch norm", "compiled", 4, "reptile"
    yield "evaluation mode", "vectorized+compiled", 4, "reptile"
    for algorithm in ALGORITHMS[1:]:
        yield "batch norm", "vectorized", 4, algorithm
        yield "mlp", "vectorized+compiled", 4, algorithm
    yield "batch norm", "vectorized", None, "reptile"
    yield "mlp", "vectorized+compiled", None, "reptile"


def results(learner, tasks):
    """Return φ, the record, and the curves of three other tasks."""
    learner.train(tasks())
    return everything(learner), learner.evaluate(tasks(seed=1), num_tasks=3).losses


@pytest.mark.usefixtures("float64", "untraced", "one_thread")
@pytest.mark.parametrize(("name", "engine", "batch_size", "algorithm"), sorted({*cases()}, key=str))
def test_as_one_by_one(name, engine, batch_size, algorithm):
    """In φ, buffers, moments, record and curves; the twin slices and averages by hand."""
    make, shape = MODELS[name]
    start, tasks = make(), partial(Ragged, shape, batch_size=batch_size)
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | MOMENTUM | {"algorithm": algorithm}
    learner = Koi(deepcopy(start), vectorize=vectorize, compile=compile, seed=0, **settings)
    found = results(learner, tasks)
    assert learner.engine == engine
    slow = Koi(deepcopy(start), vectorize=False, seed=0, **settings)
    torch.testing.assert_close(found, results(slow, tasks), rtol=0, atol=1e-10)
    if algorithm == "maml":  # to which the twin comes by differences
        return
    twin = deepcopy(start)
    state = naive.meta_train(twin, tasks(wrap=Naive), **settings)
    torch.testing.assert_close(snapshot(learner.model), snapshot(twin), rtol=0, atol=1e-10)
    others = tasks(wrap=Naive, seed=1)
    curves = naive.evaluate(twin, others, 3, 4, step_size=0.1, state=state, **MOMENTUM)
    torch.testing.assert_close(found[1], curves, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "traced", "one_thread")
def test_traced():
    test_as_one_by_one("layer norm", "vectorized+compiled", 4, "reptile")


@pytest.mark.usefixtures("float64")
def test_several_losses_of_an_example_and_weights():
    """Squared errors of four outputs; two tasks at a time of three that count differently."""

    def weighted(task):
        return replace(task, weight=torch.tensor(float(len(task.support_inputs))))

    start, tasks = around(nn.Identity()), partial(Ragged, ways=False, wrap=weighted)
    pair = []
    for vectorize in (True, False):
        learner = Koi(deepcopy(start), vectorize=vectorize, chunk_size=2, seed=0, **SETTINGS)
        pair.append(results(learner, tasks))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_order_of_minibatches(count, num_steps):
    key, batch_size = torch.tensor(99), 3
    found = cycled_order_of_some(key, torch.tensor(count), 9, batch_size, num_steps)
    if count <= batch_size:
        assert found.tolist() == [[0, 1, 2]] * num_steps
    else:
        assert torch.equal(found, cycled_order(key, count, batch_size, num_steps))


def test_capacity_is_one_shape():
    tasks = [replace(Ragged().sample(), capacity=(9, 8)) for _ in range(2)]
    assert koi.stack(tasks[:1]).support_inputs.shape == (1, 9 + 1, 3)
    assert koi.stack(tasks).query_targets.shape == (2, 8 + 1)
    tasks = [replace(task, capacity=(1, 1)) for task in tasks]
    assert koi.stack(tasks).support_inputs.shape == (2, 3 + 1, 3)


class Across(nn.Module):
    """Every example sees the mean of all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class OwnNorm(nn.BatchNorm1d):
    pass


class TestRefused:
    """By name where all must run at once, else one by one, which the log says."""

    @pytest.mark.usefixtures("untraced")
    @pytest.mark.parametrize(
        ("make", "compile", "words"),
        [
            (lambda: around(nn.BatchNorm1d(4)), True, "BatchNorm1d '1' normalises by all rows"),
            (lambda: around(OwnNorm(4)), False, "OwnNorm '1' normalises by all rows"),
            (Across, False, "does not give for RaggedTask what the plainest loop gives"),
        ],
    )
    def test_layer_that_looks_across_examples(self, make, compile, words, caplog):
        learner = Koi(make(), vectorize=True, compile=compile, seed=0, **SETTINGS)
        with pytest.raises(EngineError, match=words):
            learner.train(Ragged())
        if compile:
            return
        learner = Koi(make(), seed=0, **SETTINGS)
        learner.train(Ragged())
        assert learner.engine == "eager"
        assert re.search(words + ".*; running one task at a time", caplog.text)

    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_it_is_found_out_on_tasks_of_one_size(self, batch_size):
        """Before any of another size comes, also in minibatches."""
        learner = Koi(Across(), vectorize=True, seed=0, **SETTINGS | {"meta_batch_size": 1})
        with pytest.raises(EngineError, match="does not give for RaggedTask"):
            learner.train(Ragged(batch_size=batch_size))

    def test_single_number_has_no_variance(self):
        """As torch says of the one task by itself."""
        x, key = torch.randn(3, 3), torch.tensor(0)
        y = torch.randn(3, 4)
        tasks = [RaggedTask(x[:n], y[:n], x, y, key) for n in (1, 3)]
        for vectorize, kind in [(True, EngineError), (False, ValueError)]:
            learner = Koi(around(nn.BatchNorm1d(4)), vectorize=vectorize, **SETTINGS)
            with pytest.raises(kind, match=r"a single number|more than 1 value"):
                learner.train(InTurn(*tasks))

    def test_subclass(self):
        class Own(RaggedTask):
            def loss(self, model):
                return 2 * super().loss(model)

        def own(task):
            return Own(**{name: getattr(task, name) for name in task.__dict__})

        learner = Koi(around(nn.Identity()), vectorize=True, **SETTINGS)
        with pytest.raises(EngineError, match="Own is a subclass of RaggedTask"):
            learner.train(Ragged(wrap=own))

    def test_too_few_outputs(self):
        learner = Koi(nn.Linear(3, 2), vectorize=False, **SETTINGS)
        with pytest.raises(TaskError, match=r"the model gives 2 outputs, and .* num_ways = 3"):
            learner.train(Ragged())

    def test_criterion_that_reduces_all_the_same(self):
        def mean(predictions, targets, reduction):
            return F.mse_loss(predictions, targets)

        learner = Koi(nn.Linear(3, 4), vectorize=False, **SETTINGS)
        with pytest.raises(TaskError, match=r"gave shape \(\) for 3 examples"):
            learner.train(Ragged(ways=False, wrap=lambda task: replace(task, criterion=mean)))

    def test_what_cannot_go_together(self):
        x, key = torch.ones(2, 1), torch.tensor(0)
        with pytest.raises(ConfigurationError) as refused:
            RaggedTask(x, x, x, x, key, lambda p, t: p - t, num_ways=2)
        named = [line.split(" of a RaggedTask")[0] for line in refused.value.problems]
        assert named == ["the criterion", "num_ways"]
        with pytest.raises(ConfigurationError, match=r"num_ways = 0: .*\ncapacity = 3: "):
            RaggedTask(x, x, x, x, key, num_ways=0, capacity=3)
