"""mini-ImageNet: 100 classes of 600 photographs (Vinyals et al., 2016).

ImageNet's terms do not let it be downloaded from here; it is read in the forms in which people
have it. The classes of the three parts are those of Ravi and Larochelle (2017): 64, 16 and 20.
"""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from koi import allowed
from koi.errors import DataError, KoiWarning
from koi.fewshot import LabelledData, Splits
from koi.fewshot.images import ImageForm, needed
from koi.fewshot.sources import class_folders
from koi.files import content_of
from koi.problems.archives import MAX_HEADER, archive_at, array_form, member, values_of

SIDE = 84  # pixels
PARTS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
IMAGES = ("images", "image_data", "features", "data")
LABELS = ("labels", "targets")
_MAX_LIST = 2**26  # bytes of a list of images; the usual ones have some 3 MB
_MOST = 60_000  # images: 100 classes of 600
_MAX_LABEL = 1024  # bytes
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
            - for each part an ``.npz`` whose name ends in the part's, such as
              ``mini-imagenet-cache-train.npz``: images of shape (n, 84, 84, 3) and type uint8 as
              ``images`` (or ``image_data``, ``features``, ``data``), and for each of them its
              class's name or number as ``labels`` (or ``targets``). Pickles, which execute what
              is in them, are not read; "Your own data" in the documentation turns them into these.
        skip_missing: leave out image files that are missing, empty or damaged, and warn. False:
            they are an error.

    Raises:
        ConfigurationError: ``source`` is no path, or skip_missing neither True nor False.
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
    allowed.check(source=(source, allowed.path), skip_missing=(skip_missing, allowed.truth))
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
        raise DataError(f"{root} has no mini-ImageNet: {_wanted(root)}")
    return Splits(**{part: _read_arrays(path, part) for part, path in arrays.items()})


def _wanted(root: Path) -> str:
    """Return what a folder would need."""
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in (".pkl", ".pickle"))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which executes what is in it as it is read, so turn those "
            "that you trust into .npz, in the lines that docs/data.md has for it"
        )
    return (
        "it needs train.csv, val.csv, test.csv and images, or the folders train, val and test, or "
        "an .npz for each"
    )


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
    try:
        text = content_of(path, _MAX_LIST).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): it must be a "
            "list in UTF-8 with columns filename and label"
        ) from error
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
        if path.suffix.lower() == ".npz" and ending.search(path.stem)
    )
    if len(found) > 1:
        raise DataError(
            f"{found[0].name} and {found[1].name} in {root} could both be meant: move one away"
        )
    return found[0] if found else None


def _read_arrays(path: Path, part: str) -> LabelledData:
    """Read the images and labels of one part.

    Classes that are numbers get the part before their name, since every part may begin at 0.
    """
    with needed():
        import numpy
    with archive_at(path) as archive:
        images = _array(archive, IMAGES, _MOST * SIDE * SIDE * 3, (SIDE, SIDE, 3))
        labels = _array(archive, LABELS, _MOST * _MAX_LABEL, ())
    if images.dtype != numpy.uint8 or images.shape[1:] != (SIDE, SIDE, 3) or not len(images):
        raise DataError(
            f"{path} has no images of shape (n, {SIDE}, {SIDE}, 3) and type uint8 under one of "
            f"the names {', '.join(IMAGES)}"
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{path} has {len(images)} images and labels of shape {labels.shape}: it needs one "
            f"for each, under the name {' or '.join(LABELS)}"
        )
    classes, counts = numpy.unique(labels, return_counts=True)
    inputs = torch.from_numpy(images[labels.argsort(kind="stable")])
    names = [name if isinstance(name, str) else f"{part}/{name}" for name in classes.tolist()]
    return LabelledData(inputs.permute(0, 3, 1, 2).contiguous(), names, counts.tolist())


def _array(
    archive: zipfile.ZipFile, names: Iterable[str], max_bytes: int, shape: tuple[int, ...]
) -> Any:
    """Return the first of some arrays that an archive has; an empty one where it has none.

    The others are not unpacked, nor is one of another shape than (n, *shape) or too large.
    """
    import numpy

    inside = archive.namelist()
    found = next((f"{name}.npy" for name in names if f"{name}.npy" in inside), None)
    if found is None:
        return numpy.empty(0)
    with member(archive, found, max_bytes + MAX_HEADER) as file:
        form = array_form(file)
        if form.nbytes > max_bytes:
            raise DataError(
                f"{found} in {archive.filename} has shape {form.shape} and {form.nbytes:,} bytes, "
                f"where at most {max_bytes:,} can be meant: get it anew"
            )
        if form.shape[1:] != shape:  # which is told without its values
            return numpy.broadcast_to(numpy.empty((), form.dtype), form.shape)
        return values_of(file, form)


def _read_images(files: dict[str, Files], skip_missing: bool) -> dict[str, LabelledData]:
    """Read all images; those that are missing or empty are found before any is read."""
    paths = [path for classes in files.values() for members in classes.values() for path in members]
    bad = {path: "missing" for path in paths if not path.is_file()}
    bad |= {path: "empty" for path in paths if path not in bad and not path.stat().st_size}
    if bad and not skip_missing:
        raise DataError(f"{_counted(bad, len(paths))}: get them anew, or say skip_missing=True")
    form = ImageForm(SIDE, "RGB", nearest=True)
    read = {part: _read_part(classes, form, bad) for part, classes in files.items()}
    if bad and not skip_missing:
        raise DataError(f"{_counted(bad, len(paths))}: get them anew, or say skip_missing=True")
    if bad:
        warnings.warn(f"{_counted(bad, len(paths))}, and left out", KoiWarning, stacklevel=3)
    return read


def _read_part(files: Files, form: ImageForm, bad: dict[Path, str]) -> LabelledData:
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
