"""Labelled data: what comes back is what was given; parts have no class in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_toys import Pairs, assert_same, by_hand, everything
from koi import ConfigurationError, DataError
from koi.fewshot import Episodes, LabelledData, Splits, labelled

labels_of_several = st.lists(st.integers(-3, 12), min_size=2, max_size=30).filter(
    lambda labels: len(set(labels)) > 1
)


class TestTake:
    @given(labels_of_several)
    def test_each_class_has_its_examples_in_the_order_given(self, labels):
        inputs = torch.arange(2.0 * len(labels)).reshape(-1, 2)
        data = labelled((inputs, torch.tensor(labels)))
        assert data.classes == tuple(str(label) for label in sorted(set(labels)))
        assert data.counts == [labels.count(label) for label in sorted(set(labels))]
        assert_same(everything(data), by_hand(inputs, labels))

    @given(labels_of_several, st.integers(0, 1000))
    def test_a_dataset_in_memory_and_loaded_when_used(self, labels, seed):
        inputs = torch.rand(len(labels), 2, 2, generator=torch.Generator().manual_seed(seed))
        data = labelled(Pairs(inputs, labels))
        lazy = labelled(Pairs(inputs, labels), max_bytes=inputs.nbytes - 1)
        assert "in memory" in repr(data)
        assert "loaded when used" in repr(lazy)
        for one, other in ((data, lazy), (data.rotated(), lazy.rotated())):
            assert_same(everything(one), everything(other))
        assert_same(everything(data), by_hand(inputs, labels))

    def test_lazy_data_load_what_is_asked_for_and_no_more(self):
        pairs = Pairs(torch.rand(6, 3), [1, 0, 1, 0, 1, 0])
        data = labelled(pairs, max_bytes=10)
        pairs.asked.clear()
        taken = data.take(torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
        assert pairs.asked == [3, 4]
        assert torch.equal(taken, pairs.inputs[[3, 4]].unsqueeze(0))

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
    def test_any_shape_of_index(self, shape):
        for limit in (10**9, 1):
            data = labelled(Pairs(torch.rand(6, 5, 2), [0, 0, 0, 1, 1, 1]), max_bytes=limit)
            index = torch.zeros(shape, dtype=torch.long)
            assert data.take(index, index).shape == (*shape, 5, 2)

    @pytest.mark.parametrize(
        ("inputs", "expected"),
        [
            (torch.tensor([0, 51, 255], dtype=torch.uint8), torch.tensor([0, 0.2, 1])),
            (torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0])),
            (torch.tensor([3, 70000, -1]), torch.tensor([3, 70000, -1])),
            (torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.5, 2.0, -1.0])),
        ],
        ids=["uint8", "bool", "int64", "float32"],
    )
    def test_images_become_floats_and_the_rest_stays(self, inputs, expected):
        data = LabelledData(inputs, ["a", "b"], [2, 1])
        taken = data.take(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
        torch.testing.assert_close(taken, expected)

    @pytest.mark.parametrize(("number", "example"), [(0, 2), (1, 3), (0, -1), (2, 0), (-1, 0)])
    def test_what_is_not_there_is_an_error_and_never_a_neighbour(self, number, example):
        data = LabelledData(torch.arange(5), ["a", "b"], [2, 3])
        with pytest.raises(DataError, match="there is no such"):
            data.take(torch.tensor([number]), torch.tensor([example]))


class TestParts:
    names = st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=12, unique=True)

    @settings(max_examples=40)
    @given(names, st.data(), st.integers(0, 5))
    def test_a_split_has_no_class_twice_and_keeps_each_ones_examples(self, names, draw, seed):
        counts = draw.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)))
        data = LabelledData(torch.arange(sum(counts)), names, counts)
        first = draw.draw(st.integers(0, len(names)))
        second = draw.draw(st.integers(0, len(names) - first))
        parts = data.split(first, second, seed=seed)
        assert [len(part) for part in parts] == [first, second]
        chosen = [name for part in parts for name in part.classes]
        assert len(set(chosen)) == len(chosen) == first + second
        whole = everything(data)
        for part in parts:
            assert_same(everything(part), {name: whole[name] for name in part.classes})

    @given(names, st.randoms(), st.integers(0, 5))
    def test_a_split_depends_on_the_names_and_not_on_their_order(self, names, random, seed):
        shuffled = random.sample(names, len(names))
        one, other = (
            LabelledData(torch.arange(len(order)), order, [1] * len(order)).split(1, seed=seed)[0]
            for order in (names, shuffled)
        )
        assert one.classes == other.classes

    def test_seeds_choose_differently_and_every_class_gets_everywhere(self):
        data = LabelledData(torch.arange(4), [*"abcd"], [1] * 4)
        seen = [data.split(1, seed=seed)[0].classes[0] for seed in range(400)]
        counts = [seen.count(name) for name in data.classes]
        assert sum(counts) == 400
        assert min(counts) > 60  # 100 ± 8.7: this is 4.6 standard deviations away
        assert data.split(2, seed=3)[0].classes == data.split(2, seed=3)[0].classes

    @pytest.mark.parametrize(
        ("sizes", "lengths"),
        [((0.6, 0.2, 0.2), [6, 2, 2]), ((0.5,), [5]), ((0.1, 0.9), [1, 9]), ((1.0,), [10])],
    )
    def test_fractions(self, sizes, lengths):
        data = LabelledData(torch.arange(10), [*"abcdefghij"], [1] * 10)
        assert [len(part) for part in data.split(*sizes)] == lengths

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((6, 5), "sum to 11: there are 10 classes"),
            ((0.6, 0.5), "sum to 1.1: must be at most 1"),
            ((0.9, 0.01), "would have none"),
            ((3, 0.5), "must be whole numbers of classes, or fractions"),
            ((-1,), "must be whole numbers"),
            ((), "must be whole numbers"),
            ((True,), "must be whole numbers"),
        ],
    )
    def test_sizes_that_cannot_be_had(self, sizes, message):
        data = LabelledData(torch.arange(10), [*"abcdefghij"], [1] * 10)
        with pytest.raises(ConfigurationError, match=message):
            data.split(*sizes)

    def test_parts_share_the_memory_of_the_whole(self):
        inputs = torch.zeros(4, 2)
        data = LabelledData(inputs, [*"abcd"], [1] * 4)
        part = data.split(2)[0].subset([data.split(2)[0].classes[1]])
        inputs += 1
        assert part.take(torch.tensor(0), torch.tensor(0)).tolist() == [1, 1]

    def test_a_subset_that_cannot_be_had(self):
        data = LabelledData(torch.arange(2), ["cat", "dog"], [1, 1])
        with pytest.raises(ConfigurationError) as caught:
            data.subset(["cta", "dog", "dog"])
        assert caught.value.problems == (
            "'cta' is no class; did you mean \"cat\"?",
            "a class is given twice: give each once",
        )

    def test_rotations_of_a_part_are_those_of_its_own_images(self):
        images = torch.rand(5, 1, 3, 3)
        data = LabelledData(images, ["a", "b", "c"], [2, 1, 2]).subset(["c", "a"]).rotated()
        assert data.classes == tuple(f"{name}{end}" for end in ("", *ENDS) for name in "ca")
        found = everything(data)
        for turns, end in enumerate(("", *ENDS)):
            assert torch.equal(found["c" + end], torch.rot90(images[3:], turns, (2, 3)))
            assert torch.equal(found["a" + end], torch.rot90(images[:2], turns, (2, 3)))

    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
    def test_what_is_no_square_image_cannot_be_rotated(self, shape):
        with pytest.raises(ConfigurationError, match="must be square images"):
            LabelledData(torch.zeros(shape), ["a", "b"], [2, 2]).rotated()

    def test_rotations_are_never_split_nor_rotated_again(self):
        data = LabelledData(torch.zeros(4, 2, 2), ["a", "b"], [2, 2]).rotated()
        for part in (data, data.subset(["a", "b@90"])):
            with pytest.raises(ConfigurationError, match="first split, then rotate"):
                part.split(1)
            with pytest.raises(ConfigurationError, match="once"):
                part.rotated()

    def test_three_parts_that_share_a_class(self):
        data = LabelledData(torch.arange(3), [*"abc"], [1] * 3)
        with pytest.raises(DataError, match="the class 'b' is in two parts"):
            Splits(data.subset(["a", "b"]), data.subset([]), data.subset(["b", "c"]))


ENDS = ("@90", "@180", "@270")


class TestDevice:
    """The "meta" device, which holds no numbers, stands in for a GPU."""

    def test_the_examples_of_a_part_and_no_others_are_moved(self):
        whole = LabelledData(torch.rand(6, 1, 2, 2), ["a", "b", "c"], [1, 2, 3])
        part = whole.subset(["c", "a"]).to("meta")
        assert (part.classes, part.counts, part.device.type) == (("c", "a"), [3, 1], "meta")
        assert part._inputs.shape == (4, 1, 2, 2)
        taken = part.take_known(torch.zeros(5, device="meta", dtype=torch.long), torch.tensor(0))
        assert (taken.shape, taken.device.type) == ((5, 1, 2, 2), "meta")
        assert whole.device.type == "cpu"
        with pytest.raises(ConfigurationError, match="first split, then rotate"):
            whole.rotated().to("meta").split(2)

    def test_what_is_loaded_when_used_or_is_large_stays(self, monkeypatch):
        pairs = Pairs(torch.rand(6, 3), [1, 0, 1, 0, 1, 0])
        lazy, held = labelled(pairs, max_bytes=10), labelled(pairs)
        assert lazy.to("meta") is lazy
        assert held.to("cpu") is held
        monkeypatch.setattr("koi.fewshot.data.MAX_BYTES", 6 * 3 * 4 - 1)
        assert held.to("meta") is held
        monkeypatch.setattr("koi.fewshot.data.MAX_BYTES", 6 * 3 * 4)
        assert held.to("meta").device.type == "meta"
        episodes = Episodes(lazy, 2, 1, device="meta")
        assert episodes.sample().support_inputs.device.type == "meta"
