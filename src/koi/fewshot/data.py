"""Labelled data: examples with a class each, of which episodes are made."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koi import allowed
from koi.errors import ConfigurationError, DataError, did_you_mean, wrong
from koi.fewshot import sources
from koi.fewshot.images import ImageForm
from koi.fewshot.sources import Lazy
from koi.randomness import mix

ROTATIONS = (0, 90, 180, 270)
MAX_BYTES = 2 << 30
MOST_EXAMPLES = 2**40
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class LabelledData:
    """Examples with a class each: what episodes are drawn from.

    The examples of a class lie side by side, in one tensor that all parts of the data share, so
    that taking any number of them is one index operation. Data that do not fit in memory are
    loaded example by example, when they are asked for.

    Make one with `labelled`; the constructor is for examples that are in order already.

    Args:
        inputs: shape (num_examples, …), class after class.
        classes: the names of the classes, each once.
        counts: how many examples each class has.

    ``device`` is where the examples are.

    Raises:
        ConfigurationError, DataError: these are something else, or do not fit together.

    >>> data = LabelledData(torch.arange(5), classes=("a", "b"), counts=[2, 3])
    >>> data.classes, data.counts, len(data)
    (('a', 'b'), [2, 3], 2)
    >>> data.take(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [0, 2]]))
    tensor([[0, 1],
            [2, 4]])
    """

    def __init__(
        self, inputs: Tensor | Lazy, classes: Sequence[str], counts: Sequence[int]
    ) -> None:
        may_be = allowed.count(0, most=MOST_EXAMPLES)
        allowed.check(
            inputs=(inputs, _inputs),
            classes=(classes, allowed.each(allowed.text, "names")),
            counts=(counts, allowed.each(may_be, "whole numbers of at least 0")),
        )
        if len(set(classes)) < len(classes):
            twice = sorted({name for name in classes if list(classes).count(name) > 1})
            raise DataError(f"two classes are named {twice[0]!r}: give each a name of its own")
        if len(classes) != len(counts) or sum(counts) != len(inputs):
            raise DataError(
                f"{len(classes)} classes with counts that sum to {sum(counts)} do not fit "
                f"{len(inputs)} inputs: give a count for each class and an input for each example"
            )
        self.classes = tuple(classes)
        self.counts = list(counts)
        self._inputs = inputs
        self.device = inputs.device if isinstance(inputs, Tensor) else torch.device("cpu")
        self._limits = torch.tensor(self.counts, dtype=torch.long, device=self.device)
        self._starts = self._limits.cumsum(0) - self._limits
        self._is_rotated = False

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.classes)

    def __repr__(self) -> str:
        where = "in memory" if isinstance(self._inputs, Tensor) else "loaded when used"
        return f"LabelledData({len(self)} classes, {sum(self.counts)} examples, {where})"

    def take(self, class_index: Tensor, example_index: Tensor) -> Tensor:
        """Return the inputs of examples, in floating point if they are images.

        Args:
            class_index: numbers of classes, 0 … len − 1, of any shape (…).
            example_index: of each of them the number of an example, 0 … count − 1; shape (…).

        Returns:
            Shape (…, *input_shape). Images of type uint8 or bool, which are kept as such, come
            as floats from 0 to 1; all other types come as they are.

        Raises:
            DataError: there is no such class or example, or an example cannot be loaded.
        """
        for name, index in {"class_index": class_index, "example_index": example_index}.items():
            whole = isinstance(index, Tensor) and index.dtype in _WHOLE
            if not whole or index.shape != class_index.shape:
                raise ConfigurationError([wrong(name, index, "whole numbers, both of one shape")])
        class_index, example_index = class_index.to(self.device), example_index.to(self.device)
        if len(self) == 0 or class_index.lt(0).any() or class_index.ge(len(self)).any():
            raise DataError(f"there is no such class: class_index goes from 0 to {len(self) - 1}")
        if (example_index.lt(0) | example_index.ge(self._limits[class_index])).any():
            raise DataError(
                "there is no such example: example_index goes from 0 to the class's count − 1"
            )
        return self.take_known(class_index, example_index)

    def take_known(self, class_index: Tensor, example_index: Tensor) -> Tensor:
        """Return the inputs of examples that are there, as `take` does.

        Nothing is read back from a GPU to check it, which would wait for all that it has to do.
        """
        return scaled(self._inputs[self._starts[class_index] + example_index])

    def to(self, device: torch.device | str) -> LabelledData:
        """Return the same data on a device, where examples are then taken.

        Examples that are loaded when they are used stay where they are, as do those of more than
        2 GiB.

        >>> data = LabelledData(torch.rand(5, 1, 28, 28), classes=("a", "b"), counts=[2, 3])
        >>> data.to("meta").device
        device(type='meta')
        """
        allowed.check(device=(device, allowed.device))
        if not isinstance(self._inputs, Tensor) or torch.device(device) == self.device:
            return self
        rows = self._rows()
        if self._inputs[:1].nbytes * len(rows) > MAX_BYTES:
            return self
        other = LabelledData(self._inputs[rows].to(device), self.classes, self.counts)
        other._is_rotated = self._is_rotated
        return other

    def split(self, *sizes: int | float, seed: int = 0) -> tuple[LabelledData, ...]:
        """Return parts that have no class in common; they share the examples' memory.

        Which class goes where depends on the seed and on the names alone, neither on their order
        nor on the machine.

        Args:
            sizes: of each part, how many classes (whole numbers), or what fraction of them
                (floats that sum to at most 1).
            seed: chooses the classes.

        Raises:
            ConfigurationError: sizes that cannot be had.

        >>> data = LabelledData(torch.arange(10), [*"abcdefghij"], [1] * 10)
        >>> train, test = data.split(0.8, 0.2, seed=1)
        >>> len(train), len(test), set(train.classes) & set(test.classes)
        (8, 2, set())
        >>> [len(part) for part in data.split(3, 4)]
        [3, 4]
        """
        if self._is_rotated:
            raise ConfigurationError(
                ["rotations of one class could fall into two parts: first split, then rotate"]
            )
        bounds = _bounds(sizes, len(self))
        order = sorted(range(len(self)), key=lambda i: mix(seed, "split", self.classes[i]))
        return tuple(self._part(sorted(order[a:b])) for a, b in itertools.pairwise(bounds))

    def subset(self, classes: Sequence[str]) -> LabelledData:
        """Return the data of some classes, in the order given; it shares the examples' memory.

        Raises:
            ConfigurationError: a name that is no class, or that is given twice.

        >>> data = LabelledData(torch.arange(6), ["a", "b", "c"], [2, 2, 2])
        >>> data.subset(["c", "a"]).classes
        ('c', 'a')
        """
        allowed.check(classes=(classes, allowed.each(allowed.text, "names")))
        index = {name: i for i, name in enumerate(self.classes)}
        unknown = [name for name in classes if name not in index]
        problems = [f"{name!r} is no class{did_you_mean(name, index)}" for name in unknown]
        if len(set(classes)) < len(classes):
            problems.append("a class is given twice: give each once")
        if problems:
            raise ConfigurationError(problems)
        return self._part([index[name] for name in classes])

    def rotated(self) -> LabelledData:
        """Return four classes for each one: its images as they are and turned by 90, 180 and 270°.

        Turned counterclockwise, under names such as ``"a@90"``. In memory this takes four times
        the space.

        Raises:
            ConfigurationError: the inputs are not square images, or are rotations already.

        >>> data = LabelledData(torch.arange(8).reshape(2, 1, 2, 2), ["a", "b"], [1, 1])
        >>> data.rotated().classes
        ('a', 'b', 'a@90', 'b@90', 'a@180', 'b@180', 'a@270', 'b@270')
        >>> data.rotated().take(torch.tensor(2), torch.tensor(0))
        tensor([[[1, 3],
                 [0, 2]]])
        """
        shape = self._inputs.shape[1:]
        if self._is_rotated or len(shape) < 2 or shape[-1] != shape[-2]:
            raise ConfigurationError(
                [f"inputs of shape {tuple(shape)} cannot be rotated: must be square images, once"]
            )
        rows = self._rows()
        if isinstance(self._inputs, Tensor):
            upright = self._inputs[rows]
            inputs: Tensor | Lazy = torch.cat([torch.rot90(upright, k, (-2, -1)) for k in range(4)])
        else:
            inputs = self._inputs.rotated(rows)
        names = [
            f"{name}@{angle}" if angle else name for angle in ROTATIONS for name in self.classes
        ]
        other = LabelledData(inputs, names, self.counts * len(ROTATIONS))
        other._is_rotated = True
        return other

    def _rows(self) -> Tensor:
        """Return the numbers of all examples, class after class."""
        starts = zip(self._starts.tolist(), self.counts, strict=True)
        return torch.cat([torch.arange(s, s + n) for s, n in starts] or [torch.arange(0)])

    def _part(self, index: list[int]) -> LabelledData:
        part = copy.copy(self)
        part.classes = tuple(self.classes[i] for i in index)
        part.counts = [self.counts[i] for i in index]
        rows = torch.tensor(index, dtype=torch.long, device=self.device)
        part._limits, part._starts = self._limits[rows], self._starts[rows]
        return part


@dataclass(frozen=True)
class Splits:
    """Labelled data in three parts, no class in two of them.

    Args:
        train: to learn an initialisation from.
        validation: to choose settings by; it can be empty.
        test: to look at once, at the end.

    Raises:
        DataError: a class is in two parts.
    """

    train: LabelledData
    validation: LabelledData
    test: LabelledData

    def __post_init__(self) -> None:
        kind = allowed.instance(LabelledData, "labelled data")
        allowed.check(**{name: (part, kind) for name, part in vars(self).items()})
        names = [name for part in (self.train, self.validation, self.test) for name in part.classes]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"the class {twice!r} is in two parts: each class belongs in one")


def labelled(
    source: Any,
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    mode: str = "RGB",
    max_bytes: int = MAX_BYTES,
    max_pixels: int | None = None,
) -> LabelledData:
    """Return labelled data from whatever holds examples and their classes.

    Args:
        source: a pair (inputs, labels), each with one entry for each example; a dataset that
            yields (input, label), such as a ``torch.utils.data.Dataset``; a Hugging Face
            ``datasets.Dataset``; the path of a folder with a folder of images for each class (its
            name is the class's; folders may lie in folders); or labelled data, which come back as
            they are.
        input_column: of a Hugging Face dataset, the column with the inputs; None: guessed.
        label_column: the column with the labels; None: guessed.
        image_size: what images (files, or Pillow's) are resized to, bilinearly with antialiasing:
            a side, or (height, width); None: they must all have one size.
        mode: what images are converted to: "L" gives tensors of shape (1, height, width), "RGB"
            (3, height, width), of type uint8. They are first turned as their EXIF note says; what
            is transparent becomes white; grey of 16 bits is read by its upper 8 bits.
        max_bytes: data of more bytes than this are not held in memory but loaded as they are
            used. A dataset is read through once even then, for its labels.
        max_pixels: an image file of more pixels is not read but an error; None: as many as the
            environment variable KOI_MAX_PIXELS says, else 2^26, which are 8192 × 8192.

    Raises:
        DataError: the data cannot be read, of which all images are named, or do not fit together.
        ConfigurationError: the source is none of these, or options that cannot work.

    >>> data = labelled((torch.rand(6, 2), torch.tensor([7, 3, 7, 3, 3, 3])))
    >>> data.classes, data.counts
    (('3', '7'), [4, 2])
    """
    if isinstance(source, LabelledData):
        return source
    column = allowed.optional(allowed.text)
    allowed.check(
        input_column=(input_column, column),
        label_column=(label_column, column),
        max_bytes=(max_bytes, allowed.count(0, most=2**63)),
    )
    images = ImageForm(image_size, mode, max_pixels=max_pixels)
    if isinstance(source, str | os.PathLike):
        allowed.check(source=(source, allowed.path))
        found = sources.from_folder(Path(source), images, max_bytes)
    elif isinstance(source, tuple | list) and len(source) == 2 and _is_column(source[0]):
        found = sources.from_pair(*source)
    elif hasattr(source, "column_names") and hasattr(source, "features"):
        found = sources.from_columns(source, input_column, label_column, images, max_bytes)
    elif _is_dataset(source):
        found = sources.from_dataset(source, images, max_bytes)
    else:
        raise ConfigurationError(
            [
                f"source of type {type(source).__name__}: must be a pair (inputs, labels), a "
                "dataset with a length that yields (input, label), a Hugging Face dataset, or the "
                "path of a folder of class folders"
            ]
        )
    return _in_order(*found)


def _in_order(inputs: Tensor | Lazy, labels: list[int], names: list[str]) -> LabelledData:
    """Return labelled data of examples in any order; labels are numbers of names."""
    if len(names) < 2:
        raise DataError(
            f"all {len(labels)} examples are of one class, {names[0]!r}: episodes need several"
        )
    numbers = torch.tensor(labels, dtype=torch.long)
    counts = torch.bincount(numbers, minlength=len(names)).tolist()
    if (numbers.diff() < 0).any():
        order = numbers.argsort(stable=True)
        inputs = inputs[order] if isinstance(inputs, Tensor) else inputs.reordered(order)
    return LabelledData(inputs, names, counts)


def _bounds(sizes: Sequence[int | float], num_classes: int) -> list[int]:
    """Return where the parts of a split begin and end among num_classes."""
    problems = []
    bounds = [0]
    if sizes and all(_is_whole(size) and size >= 0 for size in sizes):
        bounds += itertools.accumulate(int(size) for size in sizes)
        if bounds[-1] > num_classes:
            problems.append(f"the sizes sum to {bounds[-1]}: there are {num_classes} classes")
    elif sizes and all(isinstance(size, float) and 0 < size <= 1 for size in sizes):
        total = list(itertools.accumulate(sizes))
        bounds += [round(part * num_classes) for part in total]
        if total[-1] > 1 + 1e-9:
            problems.append(f"the fractions sum to {total[-1]:g}: must be at most 1")
        elif any(a == b for a, b in itertools.pairwise(bounds)):
            problems.append(f"a part of {num_classes} classes would have none: take a larger one")
    else:
        problems.append("must be whole numbers of classes, or fractions above 0 and at most 1")
    if problems:
        raise ConfigurationError([f"sizes = {tuple(sizes)!r}: {problems[0]}"])
    return bounds


_inputs = allowed.that(
    lambda value: isinstance(value, Lazy) or (isinstance(value, Tensor) and value.dim() > 0),
    "a tensor of the examples, class after class",
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_dataset(value: Any) -> bool:
    """Return whether this can be asked for its examples by number."""
    is_dictionary = isinstance(value, Mapping)  # such as Hugging Face's, of several datasets
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not is_dictionary


def _is_column(value: Any) -> bool:
    """Return whether this is the inputs of a pair, and no example of a dataset of length 2."""
    return hasattr(value, "shape") and len(value.shape) > 0


def scaled(inputs: Tensor) -> Tensor:
    """Return images as floats in [0, 1], anything else as it is."""
    if inputs.dtype == torch.uint8:
        return inputs.to(torch.get_default_dtype()).div_(255)
    if inputs.dtype == torch.bool:  # bytes become floats fifteen times faster than bits do
        return inputs.view(torch.uint8).to(torch.get_default_dtype())
    return inputs
