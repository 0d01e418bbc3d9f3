"""The inner step: rates by name, over the training and over the steps; clipped gradients."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

import naive
from case_models import Complex, Tempered
from engine_toys import ENGINES, FAST, Fits, assert_agree, mlp, trained
from koi import ConfigurationError, Koi, cosine, linear
from koi.fewshot import accuracy
from koi.inner.optimizers.clipping import clipped
from test_own_loop import Stop
from test_roles import SETTINGS, Drawn
from toys import InTurn, Point, Quadratic, assert_same, snapshot

pytestmark = pytest.mark.usefixtures("float64", "one_thread", "untraced")

INNER = {
    "by name": {"step_size": {"2.*": 0.2, "*.bias": 0.05, "*": 0.1}},
    "falling": {"step_size": linear(0.2, 0.05)},
    "both": {"step_size": {"0.*": cosine(0.2, 0.01), "*": 0.1}, "clip_inner": 0.3},
    "over the steps": {"step_size": 0.2, "inner_schedule": linear(1.0, 0.1)},
    "clipped": {"step_size": 0.1, "clip_inner": 0.5},
    "all": {
        "step_size": {"2.*": linear(0.2, 0.1), "*": 0.1},
        "inner_schedule": lambda f: 1 - f / 2,
        "clip_inner": 0.4,
    },
}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1, eps=0.1),
}
ROWS = [
    ("by name", "sgd", "reptile"),
    ("by name", "adamw", "fomaml"),
    ("falling", "momentum", "reptile"),
    ("both", "sgd", "maml"),
    ("over the steps", "adamw", "reptile"),
    ("over the steps", "sgd", "maml"),
    ("clipped", "sgd", "maml"),
    ("clipped", "momentum", "eigen-reptile"),
    ("all", "momentum", "fomaml"),
    ("all", "adamw", "maml"),
]


@cache
def references(inner, optimizer, algorithm):
    """Return what the naive twin comes to, and the eager engine, once for all engines."""
    torch.manual_seed(0)
    model = mlp()
    given = {**INNER[inner], "inner_optimizer": OPTIMIZERS[optimizer], "algorithm": algorithm}
    eager = trained("eager", model, Fits(), **SETTINGS | given)
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    naive.meta_train(model, Drawn(Fits()), **settings | given)
    return snapshot(model), snapshot(eager.model)


@pytest.mark.parametrize("engine", [*ENGINES, "step by step"])
@pytest.mark.parametrize(("inner", "optimizer", "algorithm"), ROWS)
def test_same_as_the_naive_twin(inner, optimizer, algorithm, engine, monkeypatch):
    if engine == "step by step":
        monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", 0)
        engine = "vectorized+compiled"
    torch.manual_seed(0)
    model = mlp()
    given = {**INNER[inner], "inner_optimizer": OPTIMIZERS[optimizer], "algorithm": algorithm}
    koi = trained(engine, model, Fits(), **SETTINGS | given)
    twin, eager = references(inner, optimizer, algorithm)
    tolerance = 1e-6 if algorithm == "maml" else 1e-10
    torch.testing.assert_close(snapshot(koi.model), twin, rtol=0, atol=tolerance)
    if algorithm == "maml":
        torch.testing.assert_close(snapshot(koi.model), eager, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_made_anew_as_a_schedule_falls(engine):
    """Every meta-iteration has another rate, and one engine serves all."""
    engines = set()
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | {"step_size": linear(0.2, 0.0), "num_iterations": 12}
    koi = Koi(mlp(), vectorize=vectorize, compile=compile, **settings)
    koi.train(Fits(), callbacks=[lambda koi, record: engines.add(id(koi._engines._kept[0]))])
    assert len(engines) == 1
    assert koi.engine == engine


@pytest.mark.parametrize("engine", ["eager", "vectorized"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_any_optimizer(engine, clip):
    """Schedules reach optimizers that step as themselves; rates by name are refused there."""
    given = {
        "step_size": linear(0.2, 0.05),
        "inner_schedule": linear(1.0, 0.5),
        "inner_optimizer": torch.optim.RMSprop,
        "clip_inner": clip,
    }
    torch.manual_seed(0)
    model = mlp()
    twin = deepcopy(model)
    koi = trained(engine, model, Fits(), **SETTINGS | given)
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    naive.meta_train(twin, Drawn(Fits()), **settings | given)
    torch.testing.assert_close(snapshot(koi.model), snapshot(twin), rtol=0, atol=1e-9)
    with pytest.raises(ConfigurationError, match="step_size by names works with"):
        Koi(mlp(), {"*": 0.1}, inner_optimizer=torch.optim.RMSprop)


def test_hand_worked():
    """w ← w − α_j w at α = (0.5, 0.25): 8 → 4 → 3."""
    koi = Koi(Point(8.0), 0.5, 2, 1, inner_schedule=linear(1.0, 0.0))
    assert koi.adapt(Quadratic(0.0)).weight.item() == 3.0
    clipped = Koi(Point(3.0, 4.0), 0.5, 1, 1, clip_inner=1.0)
    expected = torch.tensor([3.0, 4.0]) * (1 - 0.5 / (5 + 1e-6))
    torch.testing.assert_close(clipped.adapt(Quadratic(torch.zeros(2))).weight.detach(), expected)


def test_after_training_the_rate_is_that_of_the_last_meta_iteration():
    tasks = InTurn(Quadratic(0.0))
    koi = Koi(Point(8.0), linear(0.5, 0.0), 1, 2, meta_step_size=0.0, algorithm="fomaml")
    assert koi.adapt(Quadratic(0.0)).weight.item() == 4.0, "before the first: the first's"
    koi.step(tasks)
    assert koi.adapt(Quadratic(0.0)).weight.item() == 4.0
    koi.step(tasks)
    assert koi.adapt(Quadratic(0.0)).weight.item() == 6.0, "0.25"


@pytest.mark.parametrize("vectorize", [True, False])
def test_another_rate_for_a_call(vectorize):
    koi = Koi(mlp(), 0.1, 3, 2, seed=0, vectorize=vectorize)
    other = Koi(koi.model, 0.3, 3, 2, seed=0, vectorize=vectorize)
    given = {"step_size": 0.3}
    assert torch.equal(koi.evaluate(Fits(), 5, **given).losses, other.evaluate(Fits(), 5).losses)
    metric = lambda model, task: model[0].weight.detach().clone()  # noqa: E731
    assert torch.equal(koi.measure(Fits(), metric, 5, **given), other.measure(Fits(), metric, 5))
    task = Fits().sample()
    assert_same(koi.adapt(task, **given), other.adapt(task))
    assert koi.step_size == 0.1
    with pytest.raises(ConfigurationError, match="step_size = -1"):
        koi.evaluate(Fits(), 5, step_size=-1)


def test_accuracy_takes_a_rate():
    inputs, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    from koi.fewshot import Episodes

    episodes = Episodes((inputs.to(torch.get_default_dtype()), labels), num_ways=3, num_shots=2)
    koi = Koi(nn.Linear(4, 3), step_size=1e-9, num_steps=20, seed=0)
    assert accuracy(koi, episodes, 10, step_size=1.0).inductive.mean == 1.0
    assert accuracy(koi, episodes, 10).inductive.mean < 1.0


@pytest.mark.parametrize("inner", INNER)
def test_resumed(inner, tmp_path):
    def learner(**changed):
        torch.manual_seed(0)
        given = SETTINGS | INNER[inner] | {"num_iterations": 5} | changed
        return Koi(mlp(), **given)

    alone = learner()
    alone.train(Fits())
    for callbacks in ([Stop(3)], []):
        koi = learner()
        koi.train(Fits(), None, callbacks, tmp_path, resume=True)
    assert_same(koi.model, alone.model)
    path = tmp_path / "iteration-000000005.safetensors"
    if not callable(INNER[inner].get("inner_schedule")) or inner == "over the steps":
        assert Koi.load(path, mlp()).step_size == INNER[inner]["step_size"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step_size": {"head.*": 0.1, "*": 0.1}}, r"step_size has 'head.\*', and no parameter"),
        ({"step_size": {"2.weigth": 0.1, "*": 0.1}}, r'did you mean "2.weight"\?'),
        ({"step_size": {"2.*": 0.1}}, r"step_size has no rate for 0.weight, 0.bias: add one"),
        ({"step_size": {}}, r"step_size = \{\}: must be a finite number above 0"),
        ({"step_size": {"*": -1}}, r"step_size = \{'\*': -1\}"),
        ({"step_size": {"*": {"*": 1.0}}}, r"step_size = "),
        ({"step_size": 0}, r"step_size = 0"),
        ({"inner_schedule": 0.5}, r"inner_schedule = 0.5: must be a schedule of the fraction"),
        ({"clip_inner": 0}, r"clip_inner = 0"),
        ({"step_size": linear(0.1, 0.2), "algorithm": "maml"}, r"meta_step_size is step_size by"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        Koi(mlp(), **settings).step(Fits())


def test_schedule_that_gives_no_number():
    with pytest.raises(ConfigurationError, match="the schedule step_size gave nan"):
        Koi(mlp(), lambda f: float("nan"), 2, 2)
    koi = Koi(mlp(), lambda f: 0.1 if f < 0.5 else None, 2, 2)
    with pytest.raises(ConfigurationError, match="the schedule step_size gave None"):
        koi.train(Fits())
    assert koi.iteration == 1


def test_sparse_gradients_are_clipped():
    class Rows:
        def sample(self):
            return self

        def loss(self, model):
            return model(torch.tensor([1, 1, 2])).square().sum()

    torch.manual_seed(0)
    sparse, dense = nn.Embedding(4, 3, sparse=True), nn.Embedding(4, 3)
    dense.load_state_dict(sparse.state_dict())
    for model in (sparse, dense):
        Koi(model, 0.1, 3, 2, clip_inner=0.5, vectorize=False, seed=0).train(Rows())
    torch.testing.assert_close(sparse.weight, dense.weight)


def test_numbers_of_numpy():
    koi = Koi(mlp(), {"*": np.float32(0.25)})
    assert koi.step_size == {"*": 0.25}


def test_scalars_are_clipped_by_task():
    """Gradients (3, 4) and (0.3, 0.4), of a scalar and a vector of one, have norms 5 and 0.5."""
    grads = [torch.tensor([3.0, 0.3]), torch.tensor([[4.0], [0.4]])]
    of_scalar, of_vector = clipped(grads, 1.0, stacked=True)
    torch.testing.assert_close(of_scalar, torch.tensor([0.6, 0.3]), rtol=1e-5, atol=0)
    torch.testing.assert_close(of_vector, torch.tensor([[0.8], [0.4]]), rtol=1e-5, atol=0)


class Lost(Fits):
    """The second task of each meta-batch is not finite."""

    number = 0

    def sample(self):
        self.number += 1
        task = super().sample()
        return replace(task, y=task.y * float("nan")) if self.number % 2 == 0 else task


@pytest.mark.parametrize(
    ("model", "engine"),
    [*((Tempered, engine) for engine in FAST), (Complex, "vectorized")],
)
def test_odd_parameters_of_a_task_that_is_skipped(model, engine):
    """Without a dimension, and complex."""
    model = model()
    settings = SETTINGS | {"on_nonfinite": "skip", "clip_inner": 0.5, "num_iterations": 2}
    one, other = (trained(name, model, Lost(), **settings) for name in ("eager", engine))
    assert_agree(one, other)
    assert [record.num_skipped for record in other.history] == [1, 1]
