"""vectorize="auto" runs one task at a time where all at once is impossible, and says why."""

import random
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import koi
from engine_toys import SETTINGS, Fit, Fits, assert_agree, auto, log_lines, mlp, trained
from koi import EngineError, Koi
from koi.randomness import capture, same_states

pytestmark = pytest.mark.usefixtures("float64")


class Item(Fit):
    def loss(self, model):
        loss = super().loss(model)
        return loss / max(loss.item(), 1.0)


class Branch(Fit):
    def loss(self, model):
        loss = super().loss(model)
        return loss if loss > 1 else 2 * loss


class CommonBranch(Fit):
    """Asks what is so for every task; one that comes later may be another."""

    def loss(self, model):
        loss = super().loss(model)
        return loss if self.x[0, 0] < 5 else 2 * loss


class Noisy(Fit):
    def loss(self, model):
        return (1 + torch.rand(())) * super().loss(model)


class NoisyBranch(CommonBranch):
    def loss(self, model):
        return (1 + torch.rand(())) * super().loss(model)


class Numpy(Fit):
    def loss(self, model):
        weight = float(np.abs(self.y.numpy()).mean())
        return weight * super().loss(model)


class NumpyDraw(Fit):
    def loss(self, model):
        return super().loss(model) * np.random.uniform(1, 2)


class PythonDraw(Fit):
    def loss(self, model):
        return super().loss(model) * random.uniform(1, 2)


class QueryDraw(Fit):
    """Draws only where it is evaluated."""

    @property
    def query(self):
        return NumpyDraw(self.x, self.y)


class Draws(Fit):
    """Draws from torch, too: a failed attempt must not leave that behind."""

    def loss(self, model):
        loss = super().loss(model) * (1 + torch.rand(()))
        return loss / max(loss.item(), 1.0)


class Plain:
    """No tensor task."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    loss = Fit.loss


BRANCHES = Branch, CommonBranch, Noisy, NoisyBranch
for cls in (*BRANCHES, Item, Numpy, NumpyDraw, PythonDraw, QueryDraw, Draws):
    koi.tensor_task(cls)


class Shapes(Fits):
    """Each task has one example more than the last."""

    def __init__(self):
        super().__init__(kind=Fit)

    def sample(self):
        size = int(torch.randint(2, 10, ()))
        return Fit(torch.randn(size, 3), torch.randn(size, 2))


@koi.tensor_task
@dataclass
class Scaled(Fit):
    scale: float

    def loss(self, model):
        return self.scale * super().loss(model)


class Scales(Fits):
    """Tasks with a setting that is no tensor and differs."""

    def sample(self):
        return Scaled(torch.randn(6, 3), torch.randn(6, 2), float(torch.rand(())))


class Mixed(Fits):
    """Tasks of two classes."""

    def sample(self):
        kind = Fit if torch.rand(()) < 0.5 else Draws
        return kind(torch.randn(6, 3), torch.randn(6, 2))


TASKS = {
    "item": (Fits(kind=Item), "Item", "without .item()"),
    "branch": (Fits(kind=Branch), "Branch", "torch.where"),
    "numpy": (Fits(kind=Numpy), "Numpy", "compute with torch"),
    "numpy draws": (Fits(kind=NumpyDraw), "NumPy's random generator", "draw from torch"),
    "python draws": (Fits(kind=PythonDraw), "Python's or", "draw from torch"),
    "shapes": (Shapes(), "'x' of Fit cannot be stacked", "one shape, type and device"),
    "settings": (Scales(), "'scale' of Scaled", "make it a tensor, or equal"),
    "classes": (Mixed(), "Draws", "of one class"),
    "no tensors": (Fits(kind=Plain), "Plain is not a tensor task", "@koi.tensor_task"),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_that_run_one_by_one(name, caplog):
    tasks, why, mend = TASKS[name]
    model = mlp()
    learner = auto(model, tasks)
    assert learner.engine == "eager"
    if name == "no tensors":
        assert not log_lines(caplog)  # nothing was tried, nothing is amiss
    else:
        (line,) = log_lines(caplog)
        assert why in line
        assert mend in line
        assert line.endswith("; running one task at a time")
    assert_agree(learner, trained("eager", model, tasks), tolerance=0)


@pytest.mark.parametrize("num_steps", [2, 20])
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_no_graph_for_each_value_of_a_setting(vectorize, num_steps, untraced, caplog):
    """20 steps are compiled one by one, 2 in one graph."""
    model, settings = mlp(), SETTINGS | {"num_steps": num_steps}
    learner = Koi(deepcopy(model), compile=True, vectorize=vectorize, **settings)
    with caplog.at_level("INFO", "koi"):
        learner.train(Scales())
    expected = Koi(deepcopy(model), vectorize=False, **settings)
    expected.train(Scales())
    assert_agree(learner, expected)
    compiled = [line for line in caplog.messages if line.startswith("compiling")]
    assert len(compiled) == 8
    assert ("an inner step" in compiled[0]) == (num_steps == 20)
    (said,) = [line for line in caplog.messages if "run uncompiled" in line]
    assert "make what differs between tasks a tensor" in said


@pytest.mark.parametrize("name", TASKS)
def test_tasks_that_cannot_run_at_once(name):
    tasks, why, mend = TASKS[name]
    model = mlp()
    before = deepcopy(model.state_dict())
    with pytest.raises(EngineError) as caught:
        Koi(model, vectorize=True, **SETTINGS).train(tasks)
    assert why in str(caught.value)
    assert mend in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("kind", [Draws, NumpyDraw, PythonDraw])
def test_failed_attempt_leaves_no_trace_in_the_generators(kind, seed):
    model, states = mlp(), []
    for vectorize in ("auto", False):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        learner = Koi(deepcopy(model), vectorize=vectorize, **(SETTINGS | {"seed": seed}))
        learner.train(Fits(kind=kind))
        learner.evaluate(Fits(kind=kind), num_tasks=3)
        states.append((dict(learner.model.state_dict()), capture()))
    (one, after_one), (other, after_other) = states
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert same_states(after_one, after_other)


def test_draws_in_the_query_alone_are_found_too(caplog):
    model = mlp()
    learner = auto(model, Fits(kind=QueryDraw))
    assert learner.engine == "vectorized"
    eager = trained("eager", model, Fits(kind=QueryDraw))
    losses = learner.evaluate(Fits(kind=QueryDraw), num_tasks=5).losses
    torch.testing.assert_close(losses, eager.evaluate(Fits(kind=QueryDraw), 5).losses)
    assert "draw from torch" in caplog.text
    with pytest.raises(EngineError, match="draw from torch"):
        trained("vectorized", model, Fits(kind=QueryDraw), algorithm="fomaml")


def test_tasks_that_go_the_same_way_run_at_once(caplog):
    """And the generators are as if the attempt without the question had not been."""
    model = mlp()
    learner = auto(model, Fits(kind=NoisyBranch))
    assert learner.engine == "vectorized"
    assert not log_lines(caplog)
    assert_agree(learner, trained("vectorized", model, Fits(kind=Noisy)), tolerance=0)


def test_tasks_that_part_later_on(caplog):
    class Later(Fits):
        count = 0

        def sample(self):
            task, self.count = super().sample(), self.count + 1
            if self.count > 2 * SETTINGS["meta_batch_size"] and self.count % 2:
                task.x[0, 0] = 6.0
            return task

    model = mlp()
    learner = auto(model, Later(kind=CommonBranch), check=False)
    assert learner.engine == "eager"
    (line,) = log_lines(caplog)
    assert "on which they part; test_engines_fallback.py, line" in line
    assert "`return loss if self.x[0, 0] < 5 else 2 * loss`" in line
    assert line.endswith("; running one task at a time")
    assert_agree(learner, trained("eager", model, Later(kind=CommonBranch)))


def test_shapes_that_differ_later_on(caplog):
    class Later(Fits):
        count = 0

        def sample(self):
            self.count += 1
            size = 6 if self.count <= 2 * SETTINGS["meta_batch_size"] else self.count
            return Fit(torch.randn(size, 3), torch.randn(size, 2))

    model = mlp()
    learner = auto(model, Later())
    assert learner.engine == "eager"
    assert len(log_lines(caplog)) == 1
    assert_agree(learner, trained("eager", model, Later()))


def test_mistake_in_the_loss_is_not_blamed_on_the_engine():
    class Mistake(Fit):
        def loss(self, model):
            raise KeyError("mine")

    koi.tensor_task(Mistake)
    with pytest.raises(KeyError, match="mine"):
        auto(mlp(), Fits(kind=Mistake))


def test_what_is_impossible_is_stored(caplog, tmp_path):
    """Whoever goes on from a checkpoint does not try it again."""
    auto(mlp(), Fits(kind=Item)).save(tmp_path / "koi.safetensors")
    caplog.clear()
    later = Koi.load(tmp_path / "koi.safetensors", mlp(), num_iterations=6)
    later.train(Fits(kind=Item))
    assert later.engine == "eager"
    assert not log_lines(caplog)


def test_tensors_of_a_subclass_are_its_own():
    """The mark of `Fit` does not hide the field that a subclass without a mark adds."""

    @dataclass
    class Weighted(Fit):
        scale: Tensor

        def loss(self, model):
            return (self.scale * (model(self.x) - self.y)).square().mean()

    class Tasks:
        def sample(self):
            return Weighted(torch.randn(6, 3), torch.randn(6, 2), torch.rand(6, 1))

    model = mlp()
    assert_agree(trained("vectorized", model, Tasks()), trained("eager", model, Tasks()))


class ByFunctions(Fit):
    """With a penalty on the slope, by torch.func: the form that can be mapped."""

    def loss(self, model):
        slope = vmap(grad(lambda x: model(x).sum()))(self.x)
        return super().loss(model) + 0.1 * slope.square().mean()


class ByTangents(Fit):
    def loss(self, model):
        columns = torch.eye(self.x.shape[1]).unsqueeze(1).expand(-1, *self.x.shape)
        slopes = [jvp(model, (self.x,), (column,))[1].sum(1) for column in columns.unbind()]
        return super().loss(model) + 0.1 * torch.stack(slopes).square().mean()


class ByAutograd(Fit):
    def loss(self, model):
        x = self.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return super().loss(model) + 0.1 * slope.square().mean()


class ByAttribute(Fit):
    def loss(self, model):
        x = self.x.detach()
        x.requires_grad = True
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return super().loss(model) + 0.1 * slope.square().mean()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # jvp's
@pytest.mark.parametrize("algorithm", ["reptile", "maml"])
def test_derivatives_by_the_inputs(algorithm, caplog):
    """As losses of physics have them: one number, and the form that can be mapped is named."""
    found, start = {}, mlp()
    for kind in (ByFunctions, ByTangents, ByAutograd, ByAttribute):
        caplog.clear()
        koi = Koi(deepcopy(start), **SETTINGS, algorithm=algorithm)
        koi.train(Fits(kind=kind))
        mapped = kind in (ByFunctions, ByTangents)
        assert koi.engine == ("vectorized" if mapped else "eager")
        assert ("differentiate by torch.func.grad or torch.func.jvp" in caplog.text) != mapped
        found[kind] = koi
        assert_agree(koi, found[ByFunctions])
