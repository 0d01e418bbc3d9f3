"""mini-ImageNet as arrays in pickles and .npz, read without executing what is in them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
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
    images = next((content[key] for key in IMAGE_KEYS if key in content), None)
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
    inputs = torch.from_numpy(images)[torch.tensor(rows)].permute(0, 3, 1, 2).contiguous()
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
            content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise whatever it likes
        raise DataError(
            f"{path} cannot be read ({error}): get it anew, from a place that you trust"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}: must be a dictionary")
    return content


class _Unpickler(pickle.Unpickler):
    """Reads NumPy's arrays and Python's own numbers, strings, lists and dictionaries.

    A pickle can name any function to be called as it is read; here these are the ones that make
    arrays, and any other is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle asks for by its name."""
        allowed = _pieces_of_arrays()
        asked = module.replace("numpy._core", "numpy.core"), name
        if asked not in allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is no part of an array, and is refused"
            )
        return allowed[asked]


def _pieces_of_arrays() -> dict[tuple[str, str], Any]:
    """Return what the pickle of an array or of a number of NumPy may ask for."""
    import _codecs

    import numpy

    return {
        ("numpy", "ndarray"): numpy.ndarray,
        ("numpy", "dtype"): numpy.dtype,
        ("numpy.core.multiarray", "_reconstruct"): numpy.zeros(0).__reduce__()[0],
        ("numpy.core.multiarray", "scalar"): numpy.int64(0).__reduce__()[0],
        ("numpy.core.numeric", "_frombuffer"): numpy.zeros(1).__reduce_ex__(5)[0],
        ("_codecs", "encode"): _codecs.encode,  # bytes, in the second version of the format
        ("collections", "OrderedDict"): OrderedDict,
    }
