"""The forms in which Omniglot circulates, how it is downloaded, and what is kept of it."""

from __future__ import annotations

import itertools
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from koi import storage
from koi.errors import CheckpointError, DataError
from koi.fewshot.images import needed, pillow
from koi.files import content_of
from koi.problems.archives import archive_at, array_form, member

NUM_DRAWINGS = 20  # of each character
SIDE = 105  # pixels
_MAX_ARRAY = 2**28  # bytes of all images; the larger archive has 2.1e8 of them
_MAX_IMAGE = 2**16  # bytes of an image's file; the official ones have some 250

URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
CHECKSUMS = {
    "images_background": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}

# The alphabets of the two archives in the order in which the images' file names number the
# characters, from 0001 to 1623, and how many characters each has. The .npz form has the
# characters in this order, without names. (The order of the folders is another.)
ALPHABETS = {
    "images_background": {
        "Arcadian": 26,
        "Armenian": 41,
        "Asomtavruli_(Georgian)": 40,
        "Balinese": 24,
        "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26,
        "Cyrillic": 33,
        "Early_Aramaic": 22,
        "Syriac_(Estrangelo)": 23,
        "Anglo-Saxon_Futhorc": 29,
        "Futurama": 26,
        "Grantha": 43,
        "Greek": 24,
        "Gujarati": 48,
        "Hebrew": 22,
        "Japanese_(hiragana)": 52,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Malay_(Jawi_-_Arabic)": 40,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Alphabet_of_the_Magi": 20,
        "Mkhedruli_(Georgian)": 41,
        "Burmese_(Myanmar)": 34,
        "N_Ko": 33,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42,
        "Tagalog": 17,
        "Tifinagh": 55,
    },
    "images_evaluation": {
        "Angelic": 20,
        "Atemayar_Qelisayer": 26,
        "Atlantean": 26,
        "Aurek-Besh": 26,
        "Avesta": 26,
        "Ge_ez": 26,
        "Glagolitic": 45,
        "Gurmukhi": 45,
        "Kannada": 41,
        "Keble": 26,
        "Malayalam": 47,
        "Manipuri": 40,
        "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45,
        "Oriya": 46,
        "Syriac_(Serto)": 23,
        "Sylheti": 28,
        "Tengwar": 25,
        "Tibetan": 42,
        "ULOG": 26,
    },
}


@dataclass(frozen=True)
class Characters:
    """Names of characters and their images, shape (num_characters, 20, side, side), bool."""

    names: list[str]
    images: Tensor


def read_all(places: Sequence[str | os.PathLike[str]], image_size: int) -> Characters:
    """Read archives of any form, and the archives in folders of archives."""
    paths = [path for place in places for path in _expanded(Path(place))]
    return _joined([_read(path, nearest(image_size)) for path in paths])


def _joined(parts: Sequence[Characters]) -> Characters:
    """Return all characters by the order of their names, which is the same for every form."""
    names = list(itertools.chain.from_iterable(part.names for part in parts))
    images = torch.cat([part.images for part in parts])
    order = sorted(range(len(names)), key=names.__getitem__)
    return Characters([names[i] for i in order], images[torch.tensor(order)])


def nearest(image_size: int) -> Tensor:
    """Return which of the original's pixels a smaller image has, along each side.

    The pixel under the centre of the new one, its place added up step by step: Pillow's
    arithmetic, to the last bit.
    """
    step = SIDE / image_size
    places = itertools.accumulate(itertools.repeat(step, image_size - 1), initial=step / 2)
    return torch.tensor([min(int(place), SIDE - 1) for place in places])


def _expanded(place: Path) -> list[Path]:
    """Return the archives in a folder of archives; anything else is one itself."""
    for suffix in (".npz", ".zip", ""):
        paths = [place / (name + suffix) for name in CHECKSUMS]
        if all(path.exists() for path in paths):
            return paths
    return [place]


def _read(path: Path, pixels: Tensor) -> Characters:
    """Read one archive of any form."""
    if path.is_dir():
        files = sorted(path.rglob("*.png"))
        names = [file.relative_to(path).as_posix() for file in files]
        return _from_images(path, names, lambda name: _file(path / name), pixels)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: give a folder of alphabets, an official zip or an .npz, or "
            "nothing, to download them"
        )
    with archive_at(path) as archive:
        if path.suffix == ".npz":
            return _from_npz(archive, path, pixels)

        def unpacked(name: str) -> bytes:
            with member(archive, name, _MAX_IMAGE) as file:
                return file.read(_MAX_IMAGE)

        return _from_images(path, archive.namelist(), unpacked, pixels)


def _file(path: Path) -> bytes:
    try:
        return content_of(path, _MAX_IMAGE)
    except OSError as error:
        raise DataError(
            f"the image {path} cannot be read ({error.strerror}): get it anew"
        ) from error


def _from_images(
    path: Path, names: Sequence[str], read: Callable[[str], bytes], pixels: Tensor
) -> Characters:
    """Read images that lie in alphabet/character/, given their names and how to read one."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if name.endswith(".png") and len(parts) > 2 and parts[0] != "__MACOSX":
            found.setdefault("/".join(parts[-3:-1]), []).append(name)
    if not found:
        raise DataError(f"{path} has no images in alphabet/character/: give an Omniglot archive")
    for name, members in found.items():
        if len(members) != NUM_DRAWINGS:
            raise DataError(
                f"{path} is incomplete: {name} has {len(members)} images instead of {NUM_DRAWINGS}"
            )
    images = torch.empty(len(found), NUM_DRAWINGS, len(pixels), len(pixels), dtype=torch.bool)
    for character, members in zip(images, found.values(), strict=True):
        for drawing, name in zip(character, members, strict=True):
            drawing[:] = _image(read(name), f"{name} of {path}")[pixels][:, pixels]
    return Characters(list(found), images)


def _image(content: bytes, name: str) -> Tensor:
    """Return an image as a bool tensor, True where the paper is white."""
    try:
        with pillow().open(BytesIO(content), formats=["PNG"]) as image:
            size = image.size
            values = image.convert("L").tobytes() if size == (SIDE, SIDE) else b""
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        problem = str(error) if content else "it is empty"
        raise DataError(f"the image {name} cannot be read ({problem}): get it anew") from error
    if size != (SIDE, SIDE):
        raise DataError(f"the image {name} is {size[0]} × {size[1]}: must be {SIDE} × {SIDE}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(SIDE, SIDE) > 127


def _from_npz(archive: zipfile.ZipFile, path: Path, pixels: Tensor) -> Characters:
    """Read the array ``images`` of an .npz, character by character, keeping just the pixels.

    The whole array would take 200 MB, and a second longer.
    """
    size = NUM_DRAWINGS * SIDE * SIDE
    with member(archive, "images.npy", _MAX_ARRAY) as file:
        form = array_form(file)
        if str(form.dtype) != "bool" or form.fortran_order:
            raise DataError(f"{path} has images of type {form.dtype}: must be bool, in C order")
        names = _official_names(form.shape, path)
        images = torch.empty(*form.shape[:2], len(pixels), len(pixels), dtype=torch.bool)
        for character in images:
            content = bytearray(file.read(size))
            if len(content) < size:
                raise EOFError("it ends early")
            drawings = torch.frombuffer(content, dtype=torch.uint8).view(torch.bool)
            drawings = drawings.reshape(NUM_DRAWINGS, SIDE, SIDE)
            character[:] = drawings[:, pixels][:, :, pixels]
        if file.read(1):  # to the end, where the checksum is compared
            raise EOFError("it goes on after its end")
    return Characters(names, images)


def _official_names(shape: tuple[int, ...], path: Path) -> list[str]:
    """Return the names of an official archive's characters, told by their number."""
    for alphabets in ALPHABETS.values():
        if shape == (sum(alphabets.values()), NUM_DRAWINGS, SIDE, SIDE):
            return [
                f"{alphabet}/character{number:02d}"
                for alphabet, count in alphabets.items()
                for number in range(1, count + 1)
            ]
    raise DataError(
        f"{path} has images of shape {shape}: must be (964 or 659, {NUM_DRAWINGS}, {SIDE}, {SIDE})"
    )


def downloaded(image_size: int, cache: str | os.PathLike[str] | None) -> Characters:
    """Return the official characters from the file that is kept, or download them."""
    pooch = _pooch()
    folder = Path(pooch.os_cache("koi") if cache is None else cache)
    path = folder / f"omniglot-{image_size}.safetensors"
    if path.exists():
        return _from_cache(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".omniglot-")
    except OSError as error:
        raise DataError(
            f"a file in {folder} cannot be made ({error.strerror}): give another folder as cache"
        ) from error
    with temporary:
        archives = [_fetched(name, Path(temporary.name)) for name in CHECKSUMS]
        found = read_all(archives, image_size)
    _to_cache(path, found)
    return found


def _fetched(name: str, folder: Path) -> Path:
    """Download one official archive, and remove it if it is not what it should be."""
    url = f"{URL}{name}.zip"
    try:
        return Path(
            _pooch().retrieve(
                url,
                known_hash=CHECKSUMS[name],
                fname=f"{name}.zip",
                path=folder,
                progressbar=sys.stderr.isatty(),
            )
        )
    except ValueError as error:  # so says pooch that a checksum differs
        raise DataError(
            f"{url} did not arrive as it was published (its checksum differs), and was removed: "
            "try again, or give the path of an archive that you have"
        ) from error
    except OSError as error:
        raise DataError(
            f"{url} cannot be downloaded ({error}): look at the connection, or give the path of "
            "an archive that you have"
        ) from error


def _pooch() -> Any:
    with needed():
        import pooch
    return pooch


def _to_cache(path: Path, found: Characters) -> None:
    """Keep the images, eight pixels to a byte."""
    bits = found.images.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    try:
        storage.write(
            path, {"names": found.names, "shape": list(found.images.shape), "bits": packed}
        )
    except CheckpointError as error:
        raise DataError(
            f"{path} cannot be written: make room, or give another folder as cache"
        ) from error


def _from_cache(path: Path) -> Characters:
    try:
        data = storage.read(path)
        bits = (data["bits"].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
        shape = torch.Size(data["shape"])
        images = bits.flatten()[: shape.numel()].to(torch.bool).reshape(shape)
        return Characters(data["names"], images)
    except (AttributeError, CheckpointError, KeyError, RuntimeError, TypeError) as error:
        path.unlink(missing_ok=True)
        raise DataError(
            f"{path}, in which Omniglot was kept, was damaged and has been removed: call again, "
            "to download it anew"
        ) from error
