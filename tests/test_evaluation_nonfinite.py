"""Tasks that diverge in evaluate, measure and accuracy: an error, or left out and counted."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import koi
from engine_toys import ENGINES, Fit, mlp
from koi import Evaluation, Koi, NonFiniteError, fewshot, plots
from koi.fewshot import Accuracy, accuracy
from toys import InTurn, Point, Quadratic, assert_same, snapshot

pytestmark = pytest.mark.usefixtures("untraced", "float64")
NAN, INF = float("nan"), float("inf")


@koi.tensor_task
@dataclass
class Measured:
    """Fit y at x, and be measured on y plus ``offset``."""

    x: Tensor
    y: Tensor
    offset: Tensor

    def loss(self, model):
        return F.mse_loss(model(self.x), self.y)

    @property
    def query(self):
        return Fit(self.x, self.y + self.offset)


class Some:
    """Tasks of which some have other targets, or another query set: number -> what is added."""

    def __init__(self, targets=(), offsets=()):
        self.targets, self.offsets = dict(targets), dict(offsets)
        self.count = 0

    def sample(self):
        number, self.count = self.count, self.count + 1
        y = torch.randn(6, 2) + self.targets.get(number, 0.0)
        return Measured(torch.randn(6, 3), y, torch.tensor(self.offsets.get(number, 0.0)))


def learner(engine="eager", **settings):
    torch.manual_seed(0)
    vectorize, compile = ENGINES[engine]
    settings = {"chunk_size": 2, **settings}
    return Koi(mlp(), 0.1, 2, vectorize=vectorize, compile=compile, seed=0, **settings)


def last_loss(model, task):
    return task.query.loss(model)


@pytest.mark.parametrize("engine", ENGINES)
class TestEveryEngine:
    def test_an_error_names_block_task_and_step(self, engine):
        """The targets reach the query loss at φ too; the query set alone is of no inner step."""
        asker = learner(engine)
        before = snapshot(asker.model)
        for tasks in (Some(targets={3: NAN}), Some(offsets={3: NAN})):
            with pytest.raises(NonFiniteError) as caught:
                asker.evaluate(tasks, num_tasks=5)
            where = "evaluation block 0, task 3, inner step 0"
            assert f"the loss is nan at {where}: φ is as it was" in str(caught.value)
        with pytest.raises(NonFiniteError, match=r"not finite at evaluation block 0, task 3: φ is"):
            asker.measure(Some(targets={3: NAN}), last_loss, num_tasks=5)
        assert_same(asker.model, before)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_left_out_and_counted(self, engine, bad):
        """The other rows are those of an evaluation without such tasks."""
        asker, kept = learner(engine, on_nonfinite="skip"), [0, 2, 3, 5]
        found = asker.evaluate(Some(targets={1: bad, 4: bad}), num_tasks=6)
        clean = learner(engine).evaluate(Some(), num_tasks=6)
        torch.testing.assert_close(found.losses, clean.losses[kept], rtol=0, atol=1e-12)
        assert (found.num_tasks, found.num_skipped, clean.num_skipped) == (4, 2, 0)
        losses = asker.measure(Some(targets={1: bad, 4: bad}), last_loss, num_tasks=6)
        torch.testing.assert_close(losses, clean.losses[kept, -1], rtol=0, atol=1e-10)

    def test_a_metric_may_be_nan(self, engine):
        """What it says of a finite network is the user's business."""
        values = learner(engine).measure(Some(offsets={1: NAN}), last_loss, num_tasks=3)
        assert values.isnan().tolist() == [False, True, False]

    def test_all_left_out(self, engine):
        asker = learner(engine, on_nonfinite="skip")
        for ask in (asker.evaluate, lambda *given: asker.measure(given[0], last_loss, given[1])):
            with pytest.raises(NonFiniteError, match="all of the 3 tasks were left out"):
                ask(Some(targets=dict.fromkeys(range(3), NAN)), 3)


def test_the_step_at_which_it_diverges():
    """From w = 1 at a curvature of 1e200, step by step: 1, −1e199, 1e398, which is infinite."""
    koi = Koi(Point(1.0), 0.1, 3)
    with pytest.raises(
        NonFiniteError, match=r"loss is inf at evaluation block 0, task 1, .*step 1"
    ):
        koi.evaluate(InTurn(Quadratic(0.0), Quadratic(0.0, curvature=1e200)), num_tasks=2)


def test_tasks_of_all_blocks_are_counted():
    """Blocks are of a hundred tasks; one of them is left out as a whole."""
    left_out = [5, *range(100, 200), 249]
    asker = learner(on_nonfinite="skip", chunk_size=None)
    tasks = dict.fromkeys(left_out, NAN)
    found = asker.evaluate(Some(targets=tasks), num_tasks=250, num_steps=1)
    assert (found.num_tasks, found.num_skipped) == (148, 102)
    assert asker.measure(Some(targets=tasks), last_loss, 250, 1).shape == (148,)
    with pytest.raises(NonFiniteError, match=r"evaluation block 2, task 49\b"):
        learner().evaluate(Some(targets={249: NAN}), num_tasks=250, num_steps=0)


def test_adapt_raises_also_where_tasks_are_skipped():
    """There is nothing else that it could return."""
    with pytest.raises(NonFiniteError, match="adaptation 0, task 0, inner step 0"):
        learner(on_nonfinite="skip").adapt(Some(targets={0: NAN}).sample())


class TestWords:
    """Wherever a mean is shown, so is what it is not over."""

    losses = torch.tensor([[4.0, 1.0], [2.0, 1.0]])

    def test_table(self):
        assert str(Evaluation(self.losses)).endswith("\n(mean over 2 tasks)")
        text = str(Evaluation(self.losses, num_skipped=3))
        assert text.endswith("\n(mean over 2 tasks; 3 left out as not finite)")

    def test_plot(self):
        curves = {"a": Evaluation(self.losses, 1), "b": Evaluation(self.losses)}
        label = plots.adaptation_curves(curves).axes[0].get_xlabel()
        assert "mean over 2 tasks or 2 tasks; 1 left out as not finite" in label

    def test_accuracy(self):
        text = str(Accuracy(torch.ones(2, 2), num_skipped=1))
        assert text.endswith("(2 tasks; 1 left out as not finite)")


def test_accuracy_counts_what_is_left_out():
    class Moody(fewshot.Episodes):
        count = 0

        def sample_batch(self, num_tasks):
            tasks = super().sample_batch(num_tasks)
            tasks.support_inputs[1] = NAN
            return tasks

    inputs, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    episodes = Moody((inputs, labels), num_ways=3, num_shots=2)
    koi = Koi(torch.nn.Linear(4, 3), 1.0, 20, on_nonfinite="skip", seed=0)
    found = accuracy(koi, episodes, num_tasks=10)
    assert (found.num_tasks, found.num_skipped) == (9, 1)
    assert found.inductive.mean == 1.0
    koi = Koi(torch.nn.Linear(4, 3), 1.0, 20, seed=0)
    with pytest.raises(NonFiniteError, match="block 0, task 1: φ"):
        accuracy(koi, episodes, num_tasks=10)
