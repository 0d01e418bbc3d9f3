"""Where labelled data come from: tensors, datasets, folders of images.

Each function here returns the inputs (one tensor, or loaded when used), for each example the
number of its class, and the names of the classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koi.errors import ConfigurationError, DataError, did_you_mean
from koi.fewshot.images import IMAGE_SUFFIXES, ImageForm, Unread

INPUT_COLUMNS = ("image", "img", "input", "inputs", "pixel_values", "input_ids", "text")
LABEL_COLUMNS = ("label", "labels", "target", "targets", "class")


class Lazy:
    """Inputs that are loaded one by one when they are indexed, as if they were one tensor.

    Args:
        load: returns the input of an example, given its number in the source.
        order: the numbers of the examples, in the order in which they are indexed here.
        like: one of the inputs; all have its shape and type.
    """

    def __init__(self, load: Callable[[int], Tensor], order: Tensor, like: Tensor) -> None:
        self._load = load
        self._order = order
        self._like = like
        self.shape = torch.Size((len(order), *like.shape))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Tensor) -> Tensor:
        numbers = self._order[index]
        inputs = [self._checked(number) for number in numbers.flatten().tolist()]
        return torch.stack(inputs).reshape(*index.shape, *self.shape[1:])

    def reordered(self, order: Tensor) -> Lazy:
        """Return the same inputs in another order."""
        return Lazy(self._load, self._order[order], self._like)

    def rotated(self, rows: Tensor) -> Lazy:
        """Return those rows four times, turned by 0, 90, 180 and 270° (see `torch.rot90`)."""
        chosen = self.reordered(rows)

        def load(number: int) -> Tensor:
            turns, row = divmod(number, len(chosen))
            return torch.rot90(chosen[torch.tensor(row)], turns, (-2, -1))

        return Lazy(load, torch.arange(4 * len(chosen)), self._like)

    def _checked(self, number: int) -> Tensor:
        value = self._load(number)
        _check_alike(value, self._like, number)
        return value


Found = tuple[Tensor | Lazy, list[int], list[str]]


def from_pair(inputs: Any, labels: Any) -> Found:
    """Read a pair of tensors (or arrays), one entry of each for each example."""
    try:
        inputs = torch.as_tensor(inputs)
        labels = labels.tolist() if hasattr(labels, "tolist") else labels
        if isinstance(labels, str | bytes):  # which would be a label for each letter
            raise TypeError("a string")
        labels = list(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            [f"source: must be a pair (inputs, labels) of tensors or arrays ({error})"]
        ) from error
    if len(labels) != len(inputs):
        raise DataError(
            f"there are {len(inputs)} inputs and {len(labels)} labels: give one label for each"
        )
    return inputs, *_numbered(labels)


def from_dataset(dataset: Any, images: ImageForm, max_bytes: int) -> Found:
    """Read a dataset that yields (input, label)."""
    _check_not_empty(dataset)
    labels: list[Any] = [None] * len(dataset)

    def read(number: int) -> Any:
        example = dataset[number]
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise DataError(
                f"example {number} of {type(dataset).__name__} is of type "
                f"{type(example).__name__}: must be a pair (input, label)"
            )
        labels[number] = example[1]
        return example[0]

    def load(number: int) -> Tensor:
        return _tensor(read(number), images, number)

    inputs = _stored(load, len(dataset), load(0), max_bytes)
    if isinstance(inputs, Lazy):
        for number in range(len(dataset)):
            read(number)
    return inputs, *_numbered(labels)


def from_columns(
    dataset: Any,
    input_column: str | None,
    label_column: str | None,
    images: ImageForm,
    max_bytes: int,
) -> Found:
    """Read a Hugging Face dataset: a column of inputs and one of labels."""
    label_column = _column(dataset, label_column, "label_column", LABEL_COLUMNS)
    input_column = _column(dataset, input_column, "input_column", INPUT_COLUMNS)

    def load(number: int) -> Tensor:
        return _tensor(dataset[number][input_column], images, number)

    _check_not_empty(dataset)
    labels = list(dataset[label_column])
    names = getattr(dataset.features[label_column], "names", None)
    if names is not None:
        if any(label is None or not 0 <= label < len(names) for label in labels):
            raise DataError(
                f"the column {label_column!r} has examples without a label: leave them out first"
            )
        labels = [names[label] for label in labels]
    inputs = _stored(load, len(dataset), load(0), max_bytes)
    return inputs, *_numbered(labels, names)


def from_folder(root: Path, images: ImageForm, max_bytes: int) -> Found:
    """Read a folder in which every folder of images is a class."""
    files = class_folders(root)
    paths = [path for members in files.values() for path in members]
    labels = [number for number, members in enumerate(files.values()) for _ in members]
    return from_files(paths, images, max_bytes), labels, list(files)


def walked(root: Path, *, followlinks: bool = False) -> Iterator[tuple[str, list[str], list[str]]]:
    """Go through a folder and what lies in it, as `os.walk`, which leaves out what it cannot read.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or "
            "take it out"
        ) from error

    return os.walk(root, onerror=refuse, followlinks=followlinks)


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, by the name of the class, both in sorted order.

    Links are followed, and no folder is read twice: not where a link leads back to a folder that
    it lies in, without an end, nor where one makes a second class of the same images.

    Raises:
        DataError: there is no such folder, or no images, or a class without any, or a folder that
            cannot be read, or a link to one that is read already.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give one that has a folder of images for each class")
    classes: dict[str, list[Path]] = {}
    read: dict[str, str] = {}
    for place, folders, files in walked(root, followlinks=True):
        before = read.setdefault(os.path.realpath(place), place)
        if before != place:
            raise DataError(
                f"{place} is the folder {before} once more, by a link: remove the link, or put "
                "the folder itself there"
            )
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths = [
            Path(place, name)
            for name in sorted(files)
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
        name = Path(place).relative_to(root).as_posix()
        if paths and name == ".":
            raise DataError(
                f"{paths[0]} lies beside the class folders: put every image into its class's folder"
            )
        if paths:
            classes[name] = paths
        elif not folders and name != ".":
            raise DataError(f"the class folder {place} has no images: add some, or remove it")
    if not classes:
        raise DataError(f"{root} has no folders with images: make a folder for each class")
    return dict(sorted(classes.items()))


def from_files(paths: Sequence[Path], images: ImageForm, max_bytes: int) -> Tensor | Lazy:
    """Read image files, now where they fit in memory, else when they are used.

    Raises:
        DataError: some cannot be read, which are all named, or differ in size. Of those that are
            read when they are used, the beginnings alone are looked at now.
    """
    unread = Unread()
    readable = ((i, unread.tried(images.read, path)) for i, path in enumerate(paths))
    start, first = next(((i, image) for i, image in readable if image is not None), (0, None))
    if first is None:
        raise unread.error()

    def alike(number: int, image: Tensor) -> Tensor:
        if image.shape != first.shape:
            raise DataError(
                f"the image {paths[number]} is {_size(image)} and {paths[start]} is "
                f"{_size(first)}: give image_size, to which all are resized"
            )
        return image

    if first.nbytes * len(paths) > max_bytes:
        for path in paths[start:]:
            unread.tried(images.check, path)
        unread.say()
        return Lazy(lambda i: alike(i, images.read(paths[i])), torch.arange(len(paths)), first)
    inputs = first.new_empty((len(paths), *first.shape))
    for number in range(start, len(paths)):
        image = unread.tried(images.read, paths[number])
        if image is not None:
            inputs[number] = alike(number, image)
    unread.say()
    return inputs


def _stored(
    load: Callable[[int], Tensor], count: int, first: Tensor, max_bytes: int
) -> Tensor | Lazy:
    """Return all inputs as one tensor where it is not too large, else loaded when used."""
    if first.nbytes * count > max_bytes:
        return Lazy(load, torch.arange(count), first)
    inputs = first.new_empty((count, *first.shape))
    for number in range(count):
        value = load(number)
        _check_alike(value, first, number)
        inputs[number] = value
    return inputs


def _numbered(
    labels: Sequence[Any], names: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """Return for each label the number of its class, and the classes' names, in sorted order."""
    plain = [_plain(label, number) for number, label in enumerate(labels)]
    distinct = set(plain)
    if not distinct:
        raise DataError("there are no examples: give some of each class")
    if names is not None:
        order: list[Hashable] = [name for name in names if name in distinct]
    else:
        order = sorted(distinct, key=lambda label: (isinstance(label, str), label))
    index = {label: number for number, label in enumerate(order)}
    return [index[label] for label in plain], [str(label) for label in order]


def _plain(label: Any, number: int) -> int | str:
    """Return a label as a whole number or a string."""
    if hasattr(label, "item") and getattr(label, "ndim", 0) == 0:
        label = label.item()
    if isinstance(label, str):
        return label
    if isinstance(label, int | float) and math.isfinite(label) and label == int(label):
        return int(label)
    raise DataError(
        f"the label of example {number} is {label!r}: must be a whole number or the class's name"
    )


def _tensor(value: Any, images: ImageForm, number: int) -> Tensor:
    """Return one input as a tensor."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "convert") and hasattr(value, "tobytes"):  # Pillow's image
        return images.tensor(value, f"the image of example {number}")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the input of example {number} is of type {type(value).__name__}: must be a tensor, "
            "an array, numbers or an image; turn text into tokens of one length first"
        ) from error


def _column(dataset: Any, given: str | None, argument: str, usual: Iterable[str]) -> str:
    """Return the column that is meant."""
    names = list(dataset.column_names)
    if given is not None and given in names:
        return given
    allowed = ", ".join(map(repr, names))
    if given is not None:
        raise ConfigurationError(
            [f"{argument} = {given!r}: must be one of {allowed}{did_you_mean(given, names)}"]
        )
    for name in usual:
        if name in names:
            return name
    raise ConfigurationError([f"which column is meant is not clear: give {argument}, of {allowed}"])


def _check_not_empty(dataset: Any) -> None:
    try:
        size = len(dataset)
    except TypeError as error:  # as of a tensor without a dimension
        raise DataError(f"the {type(dataset).__name__} has no length: {error}") from error
    if size == 0:
        raise DataError(f"the {type(dataset).__name__} is empty: give examples of several classes")


def _check_alike(value: Tensor, first: Tensor, number: int) -> None:
    if value.shape != first.shape:
        raise DataError(
            f"example {number} has shape {tuple(value.shape)} and the first has "
            f"{tuple(first.shape)}: all must have one; let the dataset crop, resize or pad them, "
            "or give image_size"
        )
    if value.dtype != first.dtype:
        raise DataError(
            f"example {number} is of type {value.dtype} and the first of {first.dtype}: all must "
            "be of one; let the dataset convert them"
        )


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} × {image.shape[-2]}"
