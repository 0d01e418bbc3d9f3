"""`evaluate` and `adapt`: numbers checked by hand, φ left alone."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import naive
from koi import Evaluation, Koi
from toys import InTurn, Point, Quadratic, Regressions, assert_close, assert_same, small_net

SGD = torch.optim.SGD


def with_query(support, query):
    task = Quadratic(support, curvature=2.0)
    task.query = Quadratic(query, curvature=2.0)
    return task


@pytest.mark.usefixtures("float64")
class TestByHand:
    """Two tasks, (w − c)², from w = 0; a step of 1/4 goes half of the way to the support's c."""

    tasks = with_query(4.0, 6.0), with_query(-2.0, -2.0)

    def evaluate(self, **arguments):
        koi = Koi(Point(0.0), 0.25, 2)
        return koi.evaluate(InTurn(*self.tasks), num_tasks=2, **arguments)

    def test_losses(self):
        # w = 0, 2, 3 against 6, and w = 0, −1, −1.5 against −2
        expected = torch.tensor([[36.0, 16.0, 9.0], [4.0, 1.0, 0.25]])
        torch.testing.assert_close(self.evaluate().losses, expected)

    def test_mean_and_interval(self):
        evaluation = self.evaluate()
        assert evaluation.mean == pytest.approx([20, 8.5, 4.625])
        # 1.96 · s / √2, and of two values a and b, s is |a − b| / √2
        half = [1.959963984540054 * d / 2 for d in (32, 15, 8.75)]
        assert evaluation.interval == pytest.approx(half)
        assert (evaluation.before, evaluation.after) == pytest.approx((20, 4.625))
        assert (evaluation.num_tasks, evaluation.num_steps) == (2, 2)

    def test_num_steps(self):
        assert self.evaluate(num_steps=0).mean == [20]
        assert self.evaluate(num_steps=1).mean == pytest.approx([20, 8.5])
        assert self.evaluate(num_steps=4).after == pytest.approx((2.25**2 + (1 / 8) ** 2) / 2)

    def test_single_task_has_no_interval(self):
        koi = Koi(Point(0.0), 0.25, 2)
        evaluation = koi.evaluate(InTurn(*self.tasks), num_tasks=1)
        assert evaluation.mean == pytest.approx([36, 16, 9])
        assert all(math.isnan(half) for half in evaluation.interval)

    def test_table(self):
        lines = str(self.evaluate(num_steps=5)).splitlines()
        assert [line.split()[0] for line in lines[1:-1]] == ["0", "1", "2", "4", "5"]
        assert lines[1].split()[1] == "20"
        assert "2 tasks" in lines[-1]

    def test_task_without_query_is_measured_by_its_loss(self):
        koi = Koi(Point(0.0), 0.25, 2)
        evaluation = koi.evaluate(InTurn(Quadratic(4.0, curvature=2.0)), num_tasks=1)
        assert evaluation.mean == pytest.approx([16, 4, 1])


def test_default_is_a_hundred_tasks():
    assert Koi(small_net(), num_steps=2).evaluate(Regressions()).losses.shape == (100, 3)


def test_many_tasks():
    """More than Koi handles at a time: each is sampled once, in order."""

    class Numbered:
        count = 0

        def sample(self):
            self.count += 1
            return Quadratic(float(self.count))

    evaluation = Koi(Point(0.0)).evaluate(Numbered(), num_tasks=2500, num_steps=0)
    centres = torch.arange(1.0, 2501.0)
    torch.testing.assert_close(evaluation.losses[:, 0], centres**2 / 2)


class StatefulNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("optimizer", [partial(SGD, momentum=0.9), "adam", torch.optim.RMSprop])
def test_training_does_not_notice(optimizer):
    """φ, its buffers, the carried moments and the draws to come are what they were."""
    noticing, other = StatefulNet(), StatefulNet()
    other.load_state_dict(noticing.state_dict())
    settings = {"num_steps": 3, "num_iterations": 4, "meta_step_size": 0.5, "seed": 0}

    def look(koi, record):
        koi.evaluate(Regressions(split=True), num_tasks=3, num_steps=2)
        koi.adapt(Regressions().sample())

    with_looks = Koi(noticing, inner_optimizer=optimizer, **settings)
    with_looks.train(Regressions(split=True), callbacks=[look])
    Koi(other, inner_optimizer=optimizer, **settings).train(Regressions(split=True))
    assert_same(noticing, other)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("inner_state", "after"),
    [
        ("carry", 1 - 0.1 * (0.5 * 1.5 + 1)),  # from the velocity 1.5 that training left
        ("reset", 0.9),
    ],
)
def test_moments_of_training_are_where_adaptation_starts(inner_state, after):
    """As in the paper's code, unless the inner state is reset."""

    class Slope:
        def loss(self, model):
            return model.weight.sum()

    momentum = partial(SGD, momentum=0.5)
    model = Point(1.0)
    settings = {"inner_optimizer": momentum, "inner_state": inner_state, "meta_step_size": 0.0}
    koi = Koi(model, 0.1, 2, 1, **settings)
    koi.train(InTurn(Slope()))
    assert koi.adapt(Slope(), num_steps=1).weight.item() == pytest.approx(after)
    evaluation = koi.evaluate(InTurn(Slope()), num_tasks=1, num_steps=1)
    assert evaluation.mean == pytest.approx([1, after])


@pytest.mark.usefixtures("float64")
class TestAdapt:
    def test_takes_the_inner_steps(self):
        model, task = StatefulNet(), Regressions(split=True).sample()
        for num_steps in (1, 2, 5):
            adapted = Koi(model, 0.05, 3).adapt(task, num_steps)
            expected, _ = naive.adapt(model, task.minibatches(num_steps), SGD, 0.05)
            assert_close(adapted, expected)

    def test_default_is_as_many_as_in_training(self):
        koi = Koi(small_net(), 0.05, 3)
        task = Regressions().sample()
        assert_same(koi.adapt(task), koi.adapt(task, num_steps=3))

    def test_no_steps(self):
        model = StatefulNet()
        adapted = Koi(model).adapt(Regressions().sample(), num_steps=0)
        assert adapted is not model
        assert_same(adapted, model)

    @pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
    def test_result_is_a_module_of_its_own(self, algorithm):
        model = StatefulNet().eval()
        model[0].requires_grad_(False)
        koi = Koi(model, 0.05, 3, algorithm=algorithm)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = koi.adapt(Regressions().sample())
        kept = {name: value.clone() for name, value in first.state_dict().items()}
        second = koi.adapt(Regressions().sample())
        assert type(first) is StatefulNet
        assert not first.training
        assert [p.requires_grad for p in first.parameters()] == [False, True, True, True, True]
        assert all(p.is_leaf and p.grad is None for p in first.parameters())
        with torch.no_grad():
            for param in second.parameters():
                if param.requires_grad:
                    param.zero_()
        assert second[0].weight is model[0].weight, "what is frozen is shared"
        assert_same(first, kept)
        assert_same(model, before)
        assert not torch.equal(first[2].weight, model[2].weight)

    def test_result_can_be_trained_further(self):
        task = Regressions().sample()
        adapted = Koi(small_net(), 0.05, 3).adapt(task)
        optimizer = SGD(adapted.parameters(), lr=0.05)
        before = task.loss(adapted)
        before.backward()
        optimizer.step()
        assert task.loss(adapted) < before

    def test_learned_phi_adapts_better(self):
        """Meta-learning works: on tasks with one optimum nearby, φ goes there."""
        tasks = InTurn(Quadratic([5.0, 4.0]), Quadratic([5.0, 6.0]))
        koi = Koi(Point(0.0, 0.0), 0.05, 3, 200, meta_step_size=0.5, meta_batch_size=2)
        before = koi.evaluate(tasks, num_tasks=2)
        koi.train(tasks)
        after = koi.evaluate(tasks, num_tasks=2)
        assert before.after > 10
        assert after.before == pytest.approx(0.5, rel=1e-6)
        assert koi.model.weight.tolist() == pytest.approx([5, 5])


def test_evaluation_is_data():
    losses = torch.tensor([[2.0, 1.0]])
    assert Evaluation(losses).losses is losses
