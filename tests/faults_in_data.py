"""Archives and pictures from elsewhere: hostile, damaged, vast. Rows of faults.py."""

import io
import random
import resource
import shutil
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from koi import KoiError
from koi.fewshot.images import ImageForm
from koi.problems import mini_imagenet, omniglot
from koi.problems.omniglot_archives import NUM_DRAWINGS, SIDE

_draw = random.SystemRandom()
_MOST_GROWTH = 2**18  # KiB by which one try may let this process grow: what is read is far smaller
_EVIL = Path(tempfile.gettempdir(), "evil")  # where what leads out of its folder would land
_NAMES = ("images_background/A/character01", "../../../evil", str(_EVIL), "C:\\evil", "A//B/../C")
_NAMES += ("A/\x1b[31m", "é/ü", "a" * 300, "__MACOSX/A/B")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def answered(use: Callable[[], object]) -> int:
    """Return 1 where something else came than a success or one of Koi's errors, or much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        use()
    except KoiError:
        pass
    except Exception:
        return 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return int(grown > _MOST_GROWTH)


def fuzzed(content: bytes) -> bytes:
    """Return content that is cut, or has other bytes at a place, or a flipped bit."""
    place, length = _draw.randrange(len(content)), _draw.randrange(1, 32)
    kind = _draw.randrange(3)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + _draw.randbytes(length) + content[place + length :]
    bit = bytes([content[place] ^ 1 << _draw.randrange(8)])
    return content[:place] + bit + content[place + 1 :]


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def with_size(png: bytes, width: int, height: int) -> bytes:
    """Return a PNG whose header names another size, with a right checksum."""
    head = png[:16] + struct.pack(">II", width, height) + png[24:29]
    return head + zlib.crc32(head[12:]).to_bytes(4, "big") + png[33:]


@contextmanager
def _nothing_beside(folder: Path) -> Iterator[list[int]]:
    """Yield a list that gets a 1 where something came into being around a folder."""
    found: list[int] = []
    before = sorted(folder.parent.rglob("*")), _EVIL.exists()
    yield found
    found.append(int((sorted(folder.parent.rglob("*")), _EVIL.exists()) != before))


def hostile_archives(times: int) -> int:
    """Names that lead out of a folder, links, encryption, damage, bombs, evil headers of arrays."""
    drawing = png_of(Image.new("1", (SIDE, SIDE), 1))
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(times):
            folder = Path(name, str(number))
            folder.mkdir()
            make, read = _draw.choice(
                ((_of_images, omniglot.characters), (_of_arrays, mini_imagenet.load))
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a name that comes twice
                path = make(folder, drawing)
            if _draw.random() < 0.5:
                path.write_bytes(fuzzed(path.read_bytes()))
            with _nothing_beside(folder) as beside:
                lost += answered(lambda read=read, folder=folder: read(folder))
            lost += sum(beside)
            shutil.rmtree(folder)
    return lost


def _of_images(folder: Path, drawing: bytes) -> Path:
    path = folder / "images_background.zip"
    base, method = _draw.choice(_NAMES), _draw.choice(_METHODS)
    odd = _draw.randrange(NUM_DRAWINGS)
    kind = _draw.choice(("plain", "link", "bomb", "encrypted", "twice", "vast"))
    with zipfile.ZipFile(path, "w", method) as file:
        for number in range(NUM_DRAWINGS):
            info, content = zipfile.ZipInfo(f"{base}/{number:02d}.png"), drawing
            info.compress_type = method
            if number == odd and kind == "link":
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                content = b"/etc/passwd"
            elif number == odd and kind == "bomb":
                info.compress_type, content = zipfile.ZIP_DEFLATED, bytes(2**25)
            elif number == odd and kind == "vast":
                content = with_size(drawing, 2**16, 2**16)
            elif number == odd and kind == "twice":
                info.filename = f"{base}/{(number + 1) % NUM_DRAWINGS:02d}.png"
            file.writestr(info, content)
    if kind == "encrypted":
        content = bytearray(path.read_bytes())
        for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            start = content.find(mark)
            content[start + place] |= 1
        path.write_bytes(content)
    return path


_HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 84, 84, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 84, 84, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 84, 84, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -84, 84, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<U99999999', 'fortran_order': False, 'shape': (4,), }",
    f"__import__('os').system('touch {_EVIL}')",
    "(" * 5000,
)


def _of_arrays(folder: Path, _: bytes) -> Path:
    images, labels = np.zeros((2, 84, 84, 3), np.uint8), np.array(["a", "b"])
    for part in ("train", "val", "test"):
        np.savez_compressed(folder / f"{part}.npz", images=images, labels=labels)
    path = folder / f"{_draw.choice(('train', 'val', 'test'))}.npz"
    if _draw.random() < 0.5:
        return path
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        odd = _draw.choice(whole.namelist())
        for name in whole.namelist():
            content = whole.read(name)
            if name == odd:
                header = _draw.choice(_HEADERS).encode().ljust(118) + b"\n"
                content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content[128:]
            made.writestr(name, content)
    return path


_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F", "PA")
_FORMATS = ("png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm")


def hostile_pictures(times: int) -> int:
    """Every mode and format, cut or fuzzed, or of a size that its header only names."""
    lost, form = 0, {"L": ImageForm(28, "L"), "RGB": ImageForm(28, "RGB")}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of notes that are cut
        for _ in range(times):
            path = Path(name, f"a.{_draw.choice(_FORMATS)}")
            path.write_bytes(_picture(path.suffix[1:]))
            mode = _draw.choice(("L", "RGB"))
            lost += answered(lambda path=path, mode=mode: _read(form[mode], path, len(mode)))
    return lost


def _read(form: ImageForm, path: Path, channels: int) -> None:
    try:
        image = form.read(path)
    except KoiError as error:
        if str(path) not in str(error):
            raise RuntimeError("it does not say which file") from error
        raise
    assert image.shape == (channels, 28, 28)
    assert image.dtype == torch.uint8


def _picture(kind: str) -> bytes:
    size = _draw.randrange(1, 60), _draw.randrange(1, 60)
    while True:
        file, mode = io.BytesIO(), _draw.choice(_MODES)
        try:
            Image.new(mode, size).save(file, kind)
        except (KeyError, OSError, ValueError):  # a format that has no such mode
            continue
        break
    content = file.getvalue()
    if kind == "png" and _draw.random() < 0.3:
        return with_size(content, _draw.randrange(1, 2**31), _draw.randrange(1, 2**31))
    return fuzzed(content) if _draw.random() < 0.8 else content
