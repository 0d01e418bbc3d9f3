"""Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people (Lake et al., 2015)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from koi import allowed
from koi.errors import DataError
from koi.fewshot import LabelledData, Splits
from koi.problems.omniglot_archives import NUM_DRAWINGS, downloaded, read_all

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

MOST_PIXELS = 1024  # of a side; the originals have 105
NUM_TRAINING = 1200  # characters; the others are for the test (section 6.1 of the paper)


def load(
    source: Paths | None = None,
    *,
    num_validation: int = 100,
    seed: int = 0,
    image_size: int = 28,
    cache: str | os.PathLike[str] | None = None,
) -> Splits:
    """Return Omniglot as the paper's experiments have it (section 6.1).

    1,200 characters, chosen at random, are for training, each in four rotations that count as
    classes of their own. The other 423 are for the test, upright. Some of the training characters
    are set apart, upright like the test's, to watch the training by; 0 of them is the paper's
    protocol. Inputs have shape (1, image_size, image_size): paper is 1 and ink is 0, as in the
    paper's code.

    Args:
        source: what `characters` reads; None: the official archives, downloaded (16 MB) at the
            first call and kept as one file of 3 MB.
        num_validation: training characters that are set apart.
        seed: chooses the characters of each part.
        image_size: pixels of a side.
        cache: folder of the file that is kept; None: the user's cache folder.

    Raises:
        DataError: the data are damaged or cannot be had; no damaged file is left behind.
        ConfigurationError: num_validation or image_size cannot be had.
    """
    allowed.check(num_validation=(num_validation, allowed.count(0, NUM_TRAINING - 1)))
    data = characters(source, image_size=image_size, cache=cache)
    if len(data) <= NUM_TRAINING:
        raise DataError(
            f"the source has {len(data)} characters, of which {NUM_TRAINING} are for training: "
            "give both archives, or split what omniglot.characters(source) returns"
        )
    num_test = len(data) - NUM_TRAINING
    test, validation, train = data.split(
        num_test, num_validation, NUM_TRAINING - num_validation, seed=seed
    )
    return Splits(train.rotated(), validation, test)


def characters(
    source: Paths | None = None,
    *,
    image_size: int = 28,
    cache: str | os.PathLike[str] | None = None,
) -> LabelledData:
    """Return all characters, upright, as classes named such as ``"Greek/character01"``.

    Images are made smaller as Pillow does it with 1-bit images: each pixel is the one that lies
    nearest in the original.

    Args:
        source: one or several of: a folder of alphabets, which are folders of characters, which
            are folders of images; an official zip; the ``.npz`` form; or a folder that holds
            ``images_background`` and ``images_evaluation``, each in one of these forms. None: as
            in `load`.
        image_size: pixels of a side.
        cache: as in `load`.

    Raises:
        ConfigurationError, DataError: as in `load`.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     folder = Path(root, "Martian", "character01")
    ...     folder.mkdir(parents=True)
    ...     for number in range(20):
    ...         Image.new("1", (105, 105), color=1).save(folder / f"{number}.png")
    ...     data = characters(root)
    >>> data.classes, data.take(torch.tensor([0]), torch.tensor([5])).shape
    (('Martian/character01',), torch.Size([1, 1, 28, 28]))
    """
    allowed.check(
        source=(source, allowed.optional(_paths)),
        image_size=(image_size, allowed.count(1, MOST_PIXELS)),
        cache=(cache, allowed.optional(allowed.path)),
    )
    if source is None:
        found = downloaded(image_size, cache)
    else:
        places = [source] if isinstance(source, str | os.PathLike) else source
        found = read_all(places, image_size)
    inputs = found.images.flatten(0, 1).unsqueeze(1)
    return LabelledData(inputs, found.names, [NUM_DRAWINGS] * len(found.names))


def _paths(value: Any) -> Any:
    """Take one path, or several."""
    several = isinstance(value, list | tuple) and len(value) > 0
    return allowed.each(allowed.path, "paths")(value) if several else allowed.path(value)
