"""Episodes: what every one of them must be, and how they are drawn."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koi import CheckpointError, ConfigurationError, DataError, Koi
from koi.fewshot import Episodes, LabelledData, accuracy, labelled
from koi.fewshot.accuracy import both_ways
from koi.randomness import Place, preserved_generators
from koi.sampling import draw
from koi.training.draws import alike


def numbered(counts):
    """Data in which every example is its own number, and the class of each number."""
    names = [f"class {i}" for i in range(len(counts))]
    data = LabelledData(torch.arange(sum(counts)).unsqueeze(1), names, counts)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return data, owner


@settings(max_examples=60)
@given(st.data())
def test_every_episode_is_one(drawn):
    num_shots, num_queries = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(1, 3))
    least = num_shots + num_queries
    counts = drawn.draw(st.lists(st.integers(least, least + 5), min_size=2, max_size=7))
    num_ways = drawn.draw(st.integers(1, len(counts)))
    data, owner = numbered(counts)
    torch.manual_seed(drawn.draw(st.integers(0, 2**32)))
    task = Episodes(data, num_ways, num_shots, num_queries).sample_batch(3)
    for row in range(3):
        support, query = task.support_inputs[row].flatten(), task.query_inputs[row].flatten()
        # no example twice, in support and query together
        assert len({*support.tolist(), *query.tolist()}) == num_ways * (num_shots + num_queries)
        for inputs, targets, each in (
            (support, task.support_targets[row], num_shots),
            (query, task.query_targets[row], num_queries),
        ):
            assert Counter(targets.tolist()) == dict.fromkeys(range(num_ways), each)
            # a label is one class, a class has one label, in support and query alike
            pairs = {(int(owner[i]), int(t)) for i, t in zip(inputs, targets, strict=True)}
            assert len(pairs) == num_ways
        classes = [owner[support[task.support_targets[row] == k]].tolist() for k in range(num_ways)]
        assert [set(c) for c in classes] == [
            set(owner[query[task.query_targets[row] == k]].tolist()) for k in range(num_ways)
        ]


class TestVarying:
    """Ways from 2 to 4 and shots from 1 to 3."""

    def episodes(self, **more):
        data, _ = numbered([4, 6, 5, 5, 4])
        return Episodes(data, (2, 4), (1, 3), num_queries=1, **more)

    def test_each_is_an_episode_of_its_own_size(self):
        seen = Counter()
        for _ in range(300):
            task = self.episodes().sample()
            counts = Counter(task.support_targets.tolist())
            (shots,) = set(counts.values())
            assert sorted(counts) == list(range(task.num_ways))
            assert task.query_targets.sort().values.tolist() == list(range(task.num_ways))
            inputs = torch.cat([task.support_inputs, task.query_inputs]).flatten()
            assert len(inputs.unique()) == len(inputs) == task.num_ways * (shots + 1)
            seen[task.num_ways, shots] += 1
        assert len(seen) == 9
        # 8 degrees of freedom: above 40 once in 100,000 times
        assert sum((count - 300 / 9) ** 2 / (300 / 9) for count in seen.values()) < 40

    def test_a_function_of_seed_and_place(self):
        """Whatever was drawn before, and however many tasks are drawn beside."""
        place = Place(7, "meta-iteration", 3)
        with preserved_generators(7):
            many = draw(self.episodes(), 6, place).tasks
            part = draw(self.episodes(), 6, place, (4, 6), whole=False).tasks
            others = draw(self.episodes(), 6, Place(7, "meta-iteration", 4)).tasks
        for one, other in zip(many[4:], part, strict=True):
            assert alike(one, other)
        assert not alike(many, others)

    def test_all_at_once_as_one_by_one(self, float64):
        inputs, labels = torch.randn(60, 3), torch.arange(60) % 6
        start, found = torch.nn.Linear(3, 5), []
        for vectorize in (True, False):
            episodes = Episodes((inputs, labels), (2, 5), (1, 4), 2, batch_size=3)
            model = copy.deepcopy(start)
            learner = Koi(model, 0.1, 4, 3, meta_batch_size=4, vectorize=vectorize, seed=0)
            learner.train(episodes)
            found.append((model.weight, accuracy(learner, episodes, num_tasks=5).fractions))
        torch.testing.assert_close(*found, rtol=0, atol=1e-10)

    def test_accuracy_looks_at_the_ways_of_the_episode(self):
        """A model that likes class 3 best and class 0 next says 0 where there are two."""
        task = next(t for t in iter(self.episodes().sample, None) if t.num_ways == 2)

        class Constant(torch.nn.Module):
            def forward(self, x):
                return torch.tensor([1.0, 0.0, 0.0, 9.0]).repeat(len(x), 1)

        assert both_ways(Constant(), task).tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("wrong", [(4, 2), (0, 2), (2,), (2, 3.0), [2, 3], "2"])
    def test_what_is_no_range(self, wrong):
        with pytest.raises(ConfigurationError, match=r"pair .*\(fewest, most\)"):
            Episodes(numbered([4, 4])[0], wrong, 1)

    def test_the_most_must_be_there(self):
        with pytest.raises(ConfigurationError, match=r"num_ways = \(2, 4\): the data have 2"):
            Episodes(numbered([4, 4])[0], (2, 4), 1)
        with pytest.raises(DataError, match=r"an episode needs 5 \(4 shots and 1 queries\)"):
            Episodes(numbered([4, 4])[0], 2, (1, 4))


def test_draws_are_uniform():
    """Of 4 classes, 2 of them in an episode: each ordered pair is drawn equally often; χ² test."""
    data, owner = numbered([3, 5, 4, 3])
    task = Episodes(data, 2, 1, 2).sample_batch(6000)
    order = task.support_targets.argsort(1)
    classes = owner[task.support_inputs.squeeze(-1)].gather(1, order)
    pairs = Counter(map(tuple, classes.tolist()))
    assert len(pairs) == 12
    # 11 degrees of freedom: above 45 once in 100,000 times
    assert sum((count - 500) ** 2 / 500 for count in pairs.values()) < 45
    second = Counter(task.support_inputs[classes_are(classes, owner, task, 1)].flatten().tolist())
    assert set(second) <= set(range(3, 8))
    # which of class 1's five examples is the support: 4 degrees of freedom
    expected = sum(second.values()) / 5
    assert sum((second[i] - expected) ** 2 / expected for i in range(3, 8)) < 28


def classes_are(classes, owner, task, number):
    """Where a support example is of that class."""
    return owner[task.support_inputs.squeeze(-1)] == number


def test_support_is_in_random_order():
    """The first minibatch is cut from it, and must not be one class."""
    data, _ = numbered([20] * 5)
    task = Episodes(data, 5, 10, 1, batch_size=10).sample_batch(200)
    first = task.support_targets[:, :10]
    assert first.float().var(1).min() > 0
    assert (first.diff(dim=1) < 0).any(1).all()


def test_one_episode_is_a_batch_of_one():
    data, _ = numbered([4] * 3)
    episodes = Episodes(data, 2, 2, 1, batch_size=3)
    torch.manual_seed(5)
    one = episodes.sample()
    torch.manual_seed(5)
    many = episodes.sample_batch(1)
    assert torch.equal(one.support_inputs, many.support_inputs[0])
    assert torch.equal(one.query_targets, many.query_targets[0])
    assert one.batch_size == 3


class Operations(TorchDispatchMode):
    """What torch was asked to do: the operation, and the type and device of what came out."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tensors:
            assert given <= {x.device.type}, f"{function} copies from {given} to {x.device}"
            self.done.append((str(function), x.dtype, x.device.type))
        return found


@pytest.mark.parametrize("counts", [[9] * 12, [7, 9, 8, 30]])
def test_a_draw_on_a_device_is_that_on_the_cpu(counts):
    """A "meta" device stands in for a GPU: it holds no numbers, so none can be read back.

    One number of the CPU's generator, and then the same operations on whole numbers, which are
    exact on every device.
    """
    images = torch.rand(sum(counts), 1, 3, 3) > 0.5
    data = LabelledData(images, [f"class {i}" for i in range(len(counts))], counts)
    done = {}
    for device in ("cpu", "meta"):
        episodes = Episodes(data, 3, 4, 2, batch_size=5, device=device)
        with Operations() as operations:
            task = episodes.sample_batch(6)
        tensors = [x for x in vars(task).values() if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {device}
        done[device] = operations.done
        on_cpu = [each for each in operations.done if each[2] == "cpu"]
        if device == "meta":
            assert [name for name, *_ in on_cpu] == ["aten.randint.default"]
    assert [each[:2] for each in done["cpu"]] == [each[:2] for each in done["meta"]]
    floats = [name for name, dtype, _ in done["cpu"] if dtype.is_floating_point]
    assert floats == ["aten._to_copy.default"] * 2  # the images alone


@pytest.mark.usefixtures("float64")
def test_the_type_of_new_tensors_does_not_change_the_tasks():
    data, _ = numbered([6] * 5)
    drawn = []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        torch.manual_seed(3)
        drawn.append(Episodes(data, 3, 2).sample_batch(4))
    assert torch.equal(drawn[0].support_inputs, drawn[1].support_inputs)


def test_a_small_support_set_is_cycled_through():
    data, _ = numbered([8] * 3)
    task = Episodes(data, 3, 1, 1, batch_size=2).sample()
    seen = torch.cat([view.support_inputs for view in task.minibatches(6)]).flatten()
    assert set(Counter(seen.tolist()).values()) == {4}


def test_too_few_examples_are_named_at_construction():
    data, _ = numbered([9, 3, 9, 2])
    with pytest.raises(DataError, match=r"'class 1' has 3, 'class 3' has 2.*needs 6 \(5 shots"):
        Episodes(data, 2, 5, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((5, 1, 1), "num_ways = 5: the data have 4 classes"),
        ((0, 1, 1), "num_ways = 0"),
        ((2, 1.5, 1), "num_shots = 1.5"),
        ((2, True, 1), "num_shots = True"),
        ((2, 1, 0), "num_queries = 0"),
        ((2, 1, 1, -3), "batch_size = -3"),
    ],
)
def test_wrong_numbers(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        Episodes(numbered([4] * 4)[0], *arguments)


def test_a_training_goes_on_with_the_same_classes_only(tmp_path):
    """Or classes that were kept for the test would be trained on after a resume."""
    inputs, labels = torch.rand(60, 4), torch.arange(12).repeat(5)
    parts = {seed: labelled((inputs, labels)).split(6, 6, seed=seed)[0] for seed in (0, 1)}
    assert set(parts[0].classes) != set(parts[1].classes)

    def go_on(part):
        koi = Koi(torch.nn.Linear(4, 2), num_iterations=4, meta_step_size=0.5, seed=0)
        koi.train(Episodes(part, 2, 1), checkpoint_dir=tmp_path, resume=True)

    go_on(parts[0])
    go_on(parts[0])
    with pytest.raises(CheckpointError, match="other classes"):
        go_on(parts[1])


class Recorder(torch.nn.Module):
    """Scores of a classifier whose answer depends on what else is in the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def forward(self, x):
        self.batches.append(x.flatten().tolist())
        # right only where the whole batch is there: as many rows as a full batch of queries
        guess = x.long().flatten() % 2 if len(x) == 4 else 1 - x.long().flatten() % 2
        return torch.nn.functional.one_hot(guess, 2).float() + 0 * self.weight


def test_both_ways_see_what_the_protocol_says():
    data = LabelledData(torch.arange(8.0).unsqueeze(1), ["a", "b"], [4, 4])
    task = Episodes(data, 2, 1, 2).sample()
    task.query_targets = task.query_inputs.long().flatten() % 2
    model = Recorder()
    assert both_ways(model, task).tolist() == [1.0, 0.0]
    support, queries = task.support_inputs.flatten().tolist(), task.query_inputs.flatten().tolist()
    assert model.batches == [queries, *([*support, query] for query in queries)]


def test_accuracy_of_what_can_be_learned_and_of_what_cannot():
    inputs, labels = torch.eye(6).repeat(4, 1), torch.arange(6).repeat(4)
    koi = Koi(torch.nn.Linear(6, 3), step_size=1.0, num_steps=20, seed=0)
    found = accuracy(koi, Episodes((inputs, labels), 3, 2), num_tasks=50)
    assert found.transductive == found.inductive == (1.0, 0.0)
    assert found.num_tasks == 50
    # a constant: one class in three is right, exactly, in every task
    found = accuracy(koi, Episodes((torch.ones(24, 6), labels), 3, 2), num_tasks=50)
    assert found.inductive.mean == pytest.approx(1 / 3)
