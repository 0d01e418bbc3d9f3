"""mini-ImageNet as arrays in pickles and .npz, read without executing what is in them."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from koi.errors import DataError
from koi.fewshot import LabelledData
from koi.fewshot.sources import needed

SUFFIXES = (".npz", ".pickle", ".pkl")
IMAGE_KEYS = ("image_data", "images", "features", "data")
LABEL_KEYS = ("labels", "targets")


def read_arrays(path: Path, part: str, side: int) -> LabelledData:
    """Read one part: images, and which class each is of.

    Classes that are numbers get the part before their name, since every part may begin at 0.

    Raises:
        DataError: the file is damaged, has something else in it, or asks for code to be run.
    """
    content = _load(path)
    images: Any = next((content[key] for key in IMAGE_KEYS if key in content), None)
    shape = tuple(getattr(images, "shape", ()))
    is_uint8 = str(getattr(images, "dtype", "")) == "uint8"
    if not is_uint8 or len(shape) != 4 or shape[1:] != (side, side, 3):
        raise DataError(
            f"{path} has no images of shape (n, {side}, {side}, 3) and type uint8 under one of "
            f"the names {', '.join(IMAGE_KEYS)}"
        )
    classes = _classes(content, path, part)
    rows = [row for members in classes.values() for row in members]
    if len(set(rows)) < len(rows) or not all(0 <= row < shape[0] for row in rows):
        raise DataError(f"{path} is damaged: its classes name an image twice, or one it has not")
    inputs = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).contiguous()
    return LabelledData(inputs, list(classes), [len(members) for members in classes.values()])


def _classes(content: Mapping[str, Any], path: Path, part: str) -> dict[str, list[int]]:
    """Return the numbers of each class's images, by the name of the class."""
    if "class_dict" in content:
        members: dict[Any, list[int]] = {
            label: [int(row) for row in rows] for label, rows in content["class_dict"].items()
        }
    else:
        labels = next((content[key] for key in LABEL_KEYS if key in content), None)
        if labels is None:
            raise DataError(f"{path} has neither class_dict nor {' nor '.join(LABEL_KEYS)}")
        members = {}
        for row, label in enumerate(labels):
            members.setdefault(label.item() if hasattr(label, "item") else label, []).append(row)
    named = {
        label if isinstance(label, str) else f"{part}/{label}": members[label]
        for label in sorted(members, key=lambda label: (isinstance(label, str), label))
    }
    empty = [name for name, rows in named.items() if not rows]
    if empty or not named:
        raise DataError(f"{path} has no images of {', '.join(empty) or 'any class'}")
    return named


def _load(path: Path) -> Mapping[str, Any]:
    """Return the dictionary that a file holds."""
    with needed():
        import numpy
    try:
        if path.suffix.lower() == ".npz":
            with numpy.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        with path.open("rb") as file:  # latin1: NumPy's arrays pickled by Python 2
            content = _plain(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle can raise whatever it likes
        raise DataError(
            f"{path} cannot be read ({error}): get it anew, from a place that you trust"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}: must be a dictionary")
    return content


class _Unpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings, lists and dictionaries, and runs no code of others.

    A pickle names functions that are called as it is read. The few that the pickle of an array
    names are replaced by the ones below, which look at what they are given, unlike NumPy's own:
    those let a forged type reach beyond the array's memory. All others are refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for the thing that the pickle names."""
        named = module.replace("numpy._core", "numpy.core"), name
        if named not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is no part of an array, and is refused"
            )
        return _STAND_INS[named]


class _Type:
    """Stands for ``numpy.dtype``: plain numbers and strings only."""

    def __init__(self, kind: str, *_flags: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d+", kind):
            raise pickle.UnpicklingError(f"it asks for an array of type {kind}, which is refused")
        self._kind, self._order = kind, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = str(state[1])  # "<" or ">", or "|" for bytes

    def array(self, content: bytes | str, shape: Any = -1, order: Any = "C") -> Any:
        """Return an array of this type; Python 2 gives the content as a string."""
        import numpy

        content = content.encode("latin1") if isinstance(content, str) else content
        values = numpy.frombuffer(content, numpy.dtype(self._order + self._kind))
        return values.reshape(shape, order=order)


class _Array:
    """Stands for ``numpy.ndarray``, which is made empty and filled by its state."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        self.array = kind.array(content, shape, "F" if is_fortran else "C")


def _plain(value: Any) -> Any:
    """Return what was read with arrays in the place of what stands for them."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.array if isinstance(value, _Array) else value


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda kind, content: kind.array(content)[0],
    ("numpy.core.numeric", "_frombuffer"): lambda content, kind, *form: kind.array(content, *form),
    # bytes, in the second version of the format
    ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),
    ("collections", "OrderedDict"): OrderedDict,
}
