"""A dataset, and all that labelled data hold."""

import torch


class Pairs(torch.utils.data.Dataset):
    """A dataset of the entries of two sequences, which remembers what it was asked for."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels
        self.asked = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        self.asked.append(number)
        return self.inputs[number], self.labels[number]


def everything(data):
    """Return all inputs of each class, by its name."""
    return {
        name: data.take(torch.full((count,), number), torch.arange(count))
        for number, (name, count) in enumerate(zip(data.classes, data.counts, strict=True))
    }


def by_hand(inputs, labels):
    """The same, by a loop over the examples."""
    rows = {}
    for value, label in zip(inputs, labels, strict=True):
        rows.setdefault(str(label), []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
