"""Tasks whose data are tensors: stacked into one and taken apart; minibatches; query sets."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

import koi
from koi import ConfigurationError, Koi, KoiError, SupervisedTask, TaskError
from koi.randomness import Place
from koi.sampling import draw
from koi.supervised import cycled_order
from koi.tasks import TaskBatch, everything_of, is_tensor_task, unstack, views, with_tensors
from toys import InTurn, Regression, Regressions, assert_same, small_net


@koi.tensor_task
@dataclass
class Line:
    x: Tensor
    y: Tensor
    scale: Any = 1.0
    made: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.made.append(1)

    def loss(self, model):
        return self.scale * (model(self.x) - self.y).square().mean()


class Other(Line):
    pass


def lines(count, **arguments):
    return [Line(torch.randn(4, 1), torch.randn(4, 1), made=[], **arguments) for _ in range(count)]


def with_query(query=None):
    """Return a line that was given a query set, as tasks that are no dataclasses are."""
    (task,) = lines(1)
    task.query = lines(1)[0] if query is None else query
    return task


@pytest.mark.parametrize("compiling", [False, True])
def test_what_a_task_holds_besides_its_fields_goes_on(compiling, monkeypatch):
    """Also while it is traced, when the compiler of torch before 2.13 cannot list attributes."""
    (task,) = lines(1, scale=2.0)
    task.weight = 3.0
    template = with_tensors(task, {})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    other = with_tensors(template, {"x": torch.zeros(1)})
    assert everything_of(other) == {**vars(task), "x": other.x}
    assert torch.equal(other.x, torch.zeros(1))


class TestStacking:
    def test_there_and_back(self):
        tasks = lines(3, scale=2.0)
        stacked = koi.stack(tasks)
        assert type(stacked) is Line
        assert stacked.x.shape == (3, 4, 1)
        for task, again in zip(tasks, unstack(stacked), strict=True):
            assert torch.equal(task.x, again.x)
            assert torch.equal(task.y, again.y)
            assert again.scale == 2.0
            assert again.loss(torch.sin) == task.loss(torch.sin)

    def test_constructor_runs_once_for_each_task_only(self):
        made = []
        tasks = [Line(torch.zeros(1), torch.zeros(1), made=made) for _ in range(3)]
        unstack(koi.stack(tasks))
        assert len(made) == 3

    def test_vmap_over_the_stack_is_the_loss_of_each(self):
        tasks = lines(5)
        stacked = koi.stack(tasks)
        losses = vmap(lambda x, y: Line(x, y).loss(torch.sin))(stacked.x, stacked.y)
        torch.testing.assert_close(losses, torch.stack([task.loss(torch.sin) for task in tasks]))

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            ([object(), object()], r"object is not a tensor task: .* @koi\.tensor_task"),
            ([*lines(1), Other(torch.zeros(4, 1), torch.zeros(4, 1))], "must be of one class"),
            ([*lines(1), *lines(1, scale=2.0)], "'scale' .* differs between tasks"),
            ([*lines(1, scale=np.ones(2)), *lines(1, scale=np.zeros(2))], "'scale'"),
            ([*lines(1), Line(torch.zeros(5, 1), torch.zeros(4, 1), made=[])], "'x' .* one shape"),
            ([*lines(1), Line(torch.zeros(4, 1), 3, made=[])], "'y' .* cannot be stacked"),
            ([with_query()], "'query' of Line is a task, .* a property"),
            ([line for _ in range(2) for line in lines(1, scale=[torch.ones(2)])], "holds tensors"),
            ([with_query(torch.ones(2)), with_query(torch.ones(2))], "'query' .* is a tensor, and"),
        ],
        ids=[
            *("no tensor task", "class", "setting", "array as setting", "shape", "no tensor"),
            *("nested task", "list of tensors", "no field"),
        ],
    )
    def test_tasks_that_do_not_fit(self, tasks, message):
        with pytest.raises(KoiError, match=message):
            koi.stack(tasks)

    def test_only_dataclasses_can_be_marked(self):
        with pytest.raises(ConfigurationError, match=r"Plain, which is not a dataclass"):
            koi.tensor_task(type("Plain", (), {}))
        assert is_tensor_task(lines(1)[0])
        assert not is_tensor_task(object())


class TestDraw:
    place = Place(0, "test", 0)

    def test_one_by_one(self):
        class Tasks:
            def sample(self):
                return Line(torch.rand(4, 1), torch.rand(4, 1))

        batch = draw(Tasks(), 3, self.place)
        assert len(batch) == 3
        assert torch.equal(batch.stacked.x, torch.stack([task.x for task in batch.tasks]))

    def test_at_once(self):
        class Tasks:
            def sample_batch(self, count):
                return Line(torch.rand(count, 4, 1), torch.rand(count, 4, 1))

        batch = draw(Tasks(), 3, self.place)
        assert len(batch) == 3
        assert [task.x.shape for task in batch.tasks] == [(4, 1)] * 3
        assert torch.equal(batch.tasks[2].x, batch.stacked.x[2])
        model = nn.Linear(1, 1)
        Koi(model, num_iterations=2, num_steps=2, meta_batch_size=3).train(Tasks())

    @pytest.mark.parametrize("held", ["a query set", [torch.ones(3, 1)], {"b": torch.ones(3, 1)}])
    def test_what_each_task_would_have_whole_is_refused(self, held):
        class Tasks:
            def sample_batch(self, count):
                task = Line(torch.rand(count, 4, 1), torch.rand(count, 4, 1))
                task.query = Line(task.x, task.y) if held == "a query set" else held
                return task

        with pytest.raises(TaskError, match="'query' of Line"):
            draw(Tasks(), 3, self.place)

    def test_sample_batch_must_give_a_tensor_task(self):
        class Tasks:
            def sample_batch(self, count):
                return [Line(torch.rand(4, 1), torch.rand(4, 1))] * count

        with pytest.raises(TaskError, match="sample_batch of Tasks returned list"):
            draw(Tasks(), 3, self.place)

    def test_sample_batch_must_give_as_many_as_asked(self):
        class Tasks:
            def sample_batch(self, count):
                return Line(torch.rand(2, 4, 1), torch.rand(2, 4, 1))

        with pytest.raises(TaskError, match=r"sample_batch\(3\) of Tasks gave 2"):
            draw(Tasks(), 3, self.place)

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
    @pytest.mark.parametrize("stacked", [False, True])
    def test_chunks(self, stacked, size):
        tasks = lines(7)
        batch = TaskBatch(stacked=koi.stack(tasks)) if stacked else TaskBatch(tasks=tasks)
        chunks = list(batch.chunks(size))
        assert [first for first, _ in chunks] == list(range(0, 7, size))
        assert [len(chunk) for _, chunk in chunks][:-1] == [size] * (len(chunks) - 1)
        again = [task for _, chunk in chunks for task in chunk.tasks]
        assert all(torch.equal(a.x, b.x) for a, b in zip(again, tasks, strict=True))


keys = st.integers(-(2**63), 2**63 - 1)


class TestCycledOrder:
    @settings(max_examples=60)
    @given(key=keys, size=st.integers(1, 12), batch=st.integers(1, 12), steps=st.integers(1, 12))
    def test_every_pass_is_a_permutation(self, key, size, batch, steps):
        order = cycled_order(torch.tensor(key), size, batch, steps)
        assert order.shape == (steps, batch)
        stream = order.flatten().tolist()
        assert stream[:size] == list(range(size))[: len(stream)]
        for start in range(0, len(stream), size):
            part = stream[start : start + size]
            assert len(set(part)) == len(part)
            assert set(part) <= set(range(size))

    @settings(max_examples=30)
    @given(key=keys, size=st.integers(2, 12), batch=st.integers(1, 5), steps=st.integers(1, 9))
    def test_longer_runs_begin_with_the_shorter(self, key, size, batch, steps):
        """It is a function of the key alone: the number of steps cuts it off."""
        short = cycled_order(torch.tensor(key), size, batch, steps)
        torch.manual_seed(0)
        longer = cycled_order(torch.tensor(key), size, batch, steps + 3)
        assert torch.equal(short, longer[:steps])

    @settings(max_examples=20)
    @given(several=st.lists(keys, min_size=1, max_size=4), size=st.integers(1, 9))
    def test_vmap_gives_the_same(self, several, size):
        keys = torch.tensor(several)
        together = vmap(lambda key: cycled_order(key, size, 4, 6))(keys)
        apart = torch.stack([cycled_order(key, size, 4, 6) for key in keys])
        assert torch.equal(together, apart)

    def test_passes_and_keys_differ(self):
        order = cycled_order(torch.tensor(3), 20, 20, 4).tolist()
        assert len({tuple(row) for row in order}) == 4
        others = [tuple(cycled_order(torch.tensor(k), 20, 20, 2)[1].tolist()) for k in range(50)]
        assert len(set(others)) == 50

    def test_places_are_drawn_evenly(self):
        """Over 2000 keys each of 4 examples comes first in the second pass about 500 times."""
        first = [cycled_order(torch.tensor(k), 4, 4, 2)[1, 0] for k in range(2000)]
        counts = torch.stack(first).bincount(minlength=4)
        assert (counts - 500).abs().max() < 100  # five standard deviations

    @pytest.mark.parametrize("key", [0, 7, -5, 2**62])
    def test_noise_is_splitmix64(self, key):
        """In Python's unbounded integers; the order must not change between versions."""

        def noise(count):
            x = (key + count * 0x9E3779B9) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
            return x - 2**64 if x >= 2**63 else x

        second = sorted(range(5), key=lambda i: noise(5 + i))
        third = sorted(range(5), key=lambda i: noise(10 + i))
        order = cycled_order(torch.tensor(key), 5, 5, 3)
        assert order.tolist() == [[0, 1, 2, 3, 4], second, third]

    def test_draws_nothing(self):
        before = torch.get_rng_state()
        cycled_order(torch.tensor(1), 5, 3, 9)
        assert torch.equal(before, torch.get_rng_state())


class TestSupervisedTask:
    def task(self, size=6, batch_size=4, key=7, **arguments):
        x = torch.arange(float(size)).unsqueeze(1)
        query = torch.tensor([[10.0], [20.0]])
        data = (x, 2 * x, query, 3 * query)
        return SupervisedTask(*data, torch.tensor(key), batch_size=batch_size, **arguments)

    def test_loss_and_query(self):
        task = self.task()
        identity = nn.Identity()
        assert task.loss(identity).item() == pytest.approx((0 + 1 + 4 + 9 + 16 + 25) / 6)
        assert task.query.loss(identity).item() == pytest.approx((20**2 + 40**2) / 2)
        with_sum = self.task(criterion=lambda p, y: (p - y).abs().sum())
        assert with_sum.loss(identity).item() == 15

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
    @pytest.mark.parametrize("num_steps", [1, 3, 8])
    def test_minibatches_follow_the_cycled_order(self, batch_size, num_steps):
        task = self.task(batch_size=batch_size)
        seen = [b.support_inputs.flatten().tolist() for b in task.minibatches(num_steps)]
        assert seen == cycled_order(task.key, 6, batch_size, num_steps).tolist()
        for batch in task.minibatches(num_steps):
            assert torch.equal(batch.support_targets, 2 * batch.support_inputs)

    def test_every_example_is_seen_before_one_comes_again(self):
        seen = [b.support_inputs.flatten().tolist() for b in self.task().minibatches(3)]
        assert seen[0] + seen[1][:2] == [0, 1, 2, 3, 4, 5]
        assert sorted(seen[1][2:] + seen[2]) == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("batch_size", [None, 6, 100])
    def test_all_at_once(self, batch_size):
        task = self.task(batch_size=batch_size)
        assert [len(b.support_inputs) for b in views(task, 3)] == [6] * 3

    def test_in_the_inner_loop(self):
        """Three steps of one example each, on 0, 1 and 2, from w = 0 at a rate of 1/4."""
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        adapted = Koi(model, 0.25, 3).adapt(self.task(batch_size=1))
        w = 0.0
        for x in (0.0, 1.0, 2.0):
            w -= 0.25 * 2 * x * (w * x - 2 * x)
        assert adapted.weight.item() == pytest.approx(w)

    def test_is_a_tensor_task(self):
        tasks = [self.task(key=k) for k in range(3)]
        assert koi.stack(tasks).key.tolist() == [0, 1, 2]
        assert [task.batch_size for task in unstack(koi.stack(tasks))] == [4] * 3


def test_protocols():
    assert isinstance(lines(1)[0], koi.Task)
    assert not isinstance(small_net(), koi.Task)


class Without(Regression):
    """Says that it has neither, as fields of a dataclass do that are filled for some tasks."""

    minibatches = None

    def __init__(self, inputs, targets):
        super().__init__(inputs, targets)
        self.query = self.weight = None


class WithoutProperty(Regression):
    query = property(lambda self: None)


@pytest.mark.parametrize("kind", [Without, WithoutProperty])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_none_is_absent(kind, algorithm):
    task, one, other = Regressions().sample(), small_net(), small_net()
    other.load_state_dict(one.state_dict())
    values = []
    for model, cls in ((one, Regression), (other, kind)):
        koi = Koi(model, 0.01, 2, 2, algorithm=algorithm, meta_step_size=0.1)
        koi.train(InTurn(cls(task.inputs, task.targets)))
        values.append(koi.evaluate(InTurn(cls(task.inputs, task.targets)), num_tasks=1).after)
    assert_same(one, other)
    assert values[0] == values[1]


class WithFailing(Regression):
    """Has properties with a mistake in them, such as a name that is not there."""

    @property
    def query(self):
        return Regression(self.inputs, self.tragets)


class WithFailingWeight(Regression):
    @property
    def weight(self):
        return len(self.inpust)


@pytest.mark.parametrize("algorithm", ["fomaml", "maml"])
def test_a_property_that_fails_is_not_taken_for_absent(algorithm):
    """A query set with a mistake in it was none: the support set was measured in its place."""
    task = Regressions().sample()
    failing = WithFailing(task.inputs, task.targets)
    koi = Koi(small_net(), 0.01, 1, 1, algorithm=algorithm, meta_step_size=0.1)
    for use in (koi.train, partial(koi.evaluate, num_tasks=1)):
        with pytest.raises(AttributeError, match="tragets"):
            use(InTurn(failing))
    with pytest.raises(AttributeError, match="inpust"):
        koi.train(InTurn(WithFailingWeight(task.inputs, task.targets)))
