"""mini-ImageNet: 100 classes of 600 photographs (Vinyals et al., 2016).

ImageNet's terms do not let it be downloaded from here; it is read in the forms in which people
have it. The classes of the three parts are those of Ravi and Larochelle (2017): 64, 16 and 20.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from koi.errors import DataError, KoiWarning
from koi.fewshot import LabelledData, Splits
from koi.fewshot.sources import ImageForm, class_folders
from koi.problems.mini_imagenet_arrays import SUFFIXES, read_arrays

SIDE = 84  # pixels
PARTS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
NUM_NAMED = 3  # files that an error or warning names

# The image files of each class.
Files = dict[str, list[Path]]
Found = TypeVar("Found")


def load(source: str | os.PathLike[str], *, skip_missing: bool = False) -> Splits:
    """Return mini-ImageNet in the three parts that the source has, 3 × 84 × 84 images.

    Images of another size are made 84 × 84 by taking the nearest pixels, as the paper's code did
    with the Pillow of its time.

    Args:
        source: a folder with one of:

            - ``train.csv``, ``val.csv`` and ``test.csv``, each with the columns ``filename`` and
              ``label``, and beside them the images in ``images``;
            - the folders ``train``, ``val`` and ``test``, each with a folder of images for each
              class, as the paper's code has it;
            - for each part a ``.pkl`` (or ``.pickle``) or ``.npz`` whose name ends in the part's,
              such as ``mini-imagenet-cache-train.pkl``: images of shape (n, 84, 84, 3) and type
              uint8 as ``image_data`` (or ``images``, ``features``, ``data``), and ``class_dict``,
              from a class's name to its images' numbers, or ``labels`` (or ``targets``), one for
              each image. Nothing in a pickle is executed: one that asks for anything but arrays
              is refused.
        skip_missing: leave out image files that are missing, empty or damaged, and warn. False:
            they are an error.

    Raises:
        DataError: the source has none of these forms, or is damaged or incomplete.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for part in ("train", "val", "test"):
    ...         folder = Path(root, part, f"class-of-{part}")
    ...         folder.mkdir(parents=True)
    ...         Image.new("RGB", (84, 84), color="red").save(folder / "0.jpg")
    ...     splits = load(root)
    >>> splits.test.classes
    ('class-of-test',)
    >>> splits.test.take(torch.tensor([0]), torch.tensor([0])).shape
    torch.Size([1, 3, 84, 84])
    """
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give one that has mini-ImageNet")
    files = _each_part(lambda names: _listed(root, names)) or _each_part(
        lambda names: _foldered(root, names)
    )
    if files is not None:
        return Splits(**_read_images(files, skip_missing))
    arrays = _each_part(lambda names: _array_file(root, names))
    if arrays is None:
        raise DataError(
            f"{root} has no mini-ImageNet: it needs train.csv, val.csv, test.csv and images, or "
            "the folders train, val and test, or a .pkl or .npz for each"
        )
    return Splits(**{part: read_arrays(path, part, SIDE) for part, path in arrays.items()})


def _each_part(find: Callable[[Iterable[str]], Found | None]) -> dict[str, Found] | None:
    """Return what ``find`` gives for the names of each part, None unless it finds all three."""
    found = {part: find(names) for part, names in PARTS.items()}
    complete = {part: value for part, value in found.items() if value is not None}
    return complete if len(complete) == len(PARTS) else None


def _listed(root: Path, names: Iterable[str]) -> Files | None:
    """Return the files that a part's list names."""
    path = next((root / f"{name}.csv" for name in names if (root / f"{name}.csv").is_file()), None)
    if path is None:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"filename", "label"} <= rows[0].keys():
        raise DataError(f"{path} is no list: it must have columns filename and label, and rows")
    files: Files = {}
    for number, row in enumerate(rows, 2):
        if not row["filename"] or not row["label"]:
            raise DataError(f"{path} is cut or damaged at line {number}: get it anew")
        files.setdefault(row["label"], []).append(_place(root / "images", row))
    for label, paths in files.items():
        if len(set(paths)) < len(paths):
            raise DataError(f"{path} names an image of {label} twice: it belongs there once")
    return dict(sorted(files.items()))


def _place(images: Path, row: dict[str, str]) -> Path:
    """Return where an image lies: among all the others, or in its class's folder."""
    path, other = images / row["filename"], images / row["label"] / row["filename"]
    return other if other.is_file() else path


def _foldered(root: Path, names: Iterable[str]) -> Files | None:
    """Return the files of a part that is a folder of class folders."""
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    return None if folder is None else class_folders(folder)


def _array_file(root: Path, names: Iterable[str]) -> Path | None:
    """Return the file of arrays whose name ends in the name of a part."""
    ending = re.compile(rf"(^|[^a-z])({'|'.join(names)})$", re.IGNORECASE)
    found = sorted(
        path
        for path in root.iterdir()
        if path.suffix.lower() in SUFFIXES and ending.search(path.stem)
    )
    if len(found) > 1:
        raise DataError(
            f"{found[0].name} and {found[1].name} in {root} could both be meant: move one away"
        )
    return found[0] if found else None


def _read_images(files: dict[str, Files], skip_missing: bool) -> dict[str, LabelledData]:
    """Read all images; those that are missing or empty are found before any is read."""
    paths = [path for classes in files.values() for members in classes.values() for path in members]
    bad = {path: "missing" for path in paths if not path.is_file()}
    bad |= {path: "empty" for path in paths if path not in bad and not path.stat().st_size}
    if bad and not skip_missing:
        raise DataError(f"{_counted(bad, len(paths))}: get them anew, or say skip_missing=True")
    form = ImageForm(SIDE, "RGB", nearest=True)
    read = {part: _read_part(classes, form, bad, skip_missing) for part, classes in files.items()}
    if bad:
        warnings.warn(f"{_counted(bad, len(paths))}, and left out", KoiWarning, stacklevel=3)
    return read


def _read_part(
    files: Files, form: ImageForm, bad: dict[Path, str], skip_damaged: bool
) -> LabelledData:
    """Read the images of one part, adding damaged ones to the bad ones."""
    images = torch.empty(sum(map(len, files.values())), 3, SIDE, SIDE, dtype=torch.uint8)
    done = 0
    counts = []
    for name, paths in files.items():
        before = done
        for path in paths:
            if path in bad:
                continue
            try:
                images[done] = form.read(path)
                done += 1
            except DataError:
                if not skip_damaged:
                    raise
                bad[path] = "damaged"
        if done == before:
            raise DataError(f"all {len(paths)} images of {name} are missing, empty or damaged")
        counts.append(done - before)
    return LabelledData(images[:done], list(files), counts)


def _counted(bad: dict[Path, str], num_images: int) -> str:
    """Return how many images are bad in which way, and the first few of them.

    >>> _counted({Path("a.jpg"): "missing", Path("b.jpg"): "empty"}, 1200)
    '1 missing and 1 empty of 1,200 images (a.jpg, b.jpg)'
    """
    kinds = list(bad.values())
    counts = [
        f"{kinds.count(kind):,} {kind}" for kind in ("missing", "empty", "damaged") if kind in kinds
    ]
    named = ", ".join(map(str, list(bad)[:NUM_NAMED])) + (", …" if len(bad) > NUM_NAMED else "")
    return f"{' and '.join(counts)} of {num_images:,} images ({named})"
