"""Images as tensors: any file that Pillow reads, as it would be seen, or one sentence why not."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from koi.errors import ConfigurationError, DataError, KoiError, did_you_mean, wrong
from koi.files import opened
from koi.memory import pieces_of

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What Pillow calls the formats of these; others it may read by whatever program is installed.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = ("L", "RGB")
MAX_SIDE = 2**16  # pixels
MAX_PIXELS = 2**26  # 8192 × 8192, which take a gigabyte until they are small
_VARIABLE = "KOI_MAX_PIXELS"
_NUM_NAMED = 100
_ORIENTATION = 0x0112
# How to show what a camera that was held so took. Pillow's own `exif_transpose` writes the other
# notes anew, and fails where one of them is odd.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class ImageForm:
    """What images become: their size (None: as they are) and mode.

    An image is first turned as its EXIF note says the camera was held, and what is transparent in
    it becomes white. Grey of 16 bits is read by its upper 8 bits, as Pillow reads colour of 16: v
    becomes ⌊v / 256⌋. Images of another size are resized bilinearly with antialiasing, or to the
    nearest pixels. A file of more than max_pixels, by its header, is not read; None: of more than
    the environment's KOI_MAX_PIXELS says or, where it is not set, than 2^26.
    """

    size: int | tuple[int, int] | None
    mode: str
    nearest: bool = False
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        problems = []
        sides = self.size if isinstance(self.size, tuple) else (self.size,) * 2
        valid = len(sides) == 2 and all(
            type(side) is int and 0 < side <= MAX_SIDE for side in sides
        )
        if self.size is not None and not valid:
            problems.append(
                f"image_size = {self.size!r}: must be None, a number of pixels or (height, width)"
            )
        if not (isinstance(self.mode, str) and self.mode in MODES):
            problems.append(
                f"mode = {self.mode!r}: must be one of 'L', 'RGB'{did_you_mean(self.mode, MODES)}"
            )
        most = self.max_pixels
        if most is not None and not (type(most) is int and most > 0):
            problems.append(wrong("max_pixels", most, "None or a number of pixels"))
        if problems:
            raise ConfigurationError(problems)

    def read(self, path: Path) -> Tensor:
        """Return the image in a file.

        Raises:
            DataError: there is none, or it is damaged, or of numbers without a known black and
                white.
        """
        with _opened(path, self._most()) as image:
            return self.tensor(image, f"the image {path}")

    def read_all(self, paths: Iterable[Path]) -> list[Tensor]:
        """Return the images in files.

        Raises:
            DataError: some cannot be read, which are all named.
        """
        unread = Unread()
        found = [unread.tried(self.read, path) for path in paths]
        unread.say()
        return [image for image in found if image is not None]

    def check(self, path: Path) -> None:
        """Look at the beginning of a file, which says most of what `read` would.

        Raises:
            DataError: it cannot be read.
        """
        with _opened(path, self._most()) as image:
            _check_range(image, f"the image {path}")

    def tensor(self, image: Any, name: str = "the image") -> Tensor:
        """Return an image of Pillow as a tensor of shape (channels, height, width), uint8.

        Args:
            image: of any mode.
            name: what errors call it.

        Raises:
            DataError: it is of numbers without a known black and white (modes I and F), or Pillow
                cannot convert it.
        """
        _check_range(image, name)
        try:
            image = self._converted(_upright(image))
        except (KeyError, ValueError) as error:  # as of a mode that no file has
            raise DataError(
                f"{name} is of mode {image.mode}, which cannot be made grey or colour ({error}): "
                "convert it first"
            ) from error
        if self.size is not None:
            height, width = self.size if isinstance(self.size, tuple) else (self.size,) * 2
            methods = pillow().Resampling
            method = methods.NEAREST if self.nearest else methods.BILINEAR
            image = image.resize((width, height), method)
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return values.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()

    def _most(self) -> int:
        """Return how many pixels a file may have.

        Raises:
            ConfigurationError: the environment names no number.
        """
        if self.max_pixels is not None:
            return self.max_pixels
        given = os.environ.get(_VARIABLE, str(MAX_PIXELS))
        if not (given.isdecimal() and given.isascii() and int(given[:20]) > 0):
            raise ConfigurationError([wrong(_VARIABLE, given, "a number of pixels")])
        return int(given[:20])

    def _converted(self, image: Any) -> Any:
        """Return the image in this mode.

        What is transparent becomes white: the colour that a file has there is often black, ink's.
        """
        if image.mode.startswith("I"):
            image = _upper_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = pillow().new("RGBA", image.size, "white")
            image = pillow().alpha_composite(white, image)
        if image.mode == "LAB":  # which becomes grey by way of colour alone
            image = image.convert("RGB")
        return image.convert(self.mode)


class Unread:
    """What could not be read, gathered to be named at once.

    >>> unread = Unread()
    >>> unread.tried(ImageForm(28, "L").read, Path("nowhere.png"))
    >>> unread.say()
    Traceback (most recent call last):
    koi.errors.DataError: the image nowhere.png cannot be read (No such file or directory): ...
    """

    def __init__(self) -> None:
        self._errors: list[DataError] = []

    def tried(self, read: Callable[[Path], Tensor | None], path: Path) -> Tensor | None:
        """Return what ``read`` returns, None where it raises a `DataError`, which is kept."""
        try:
            return read(path)
        except DataError as error:
            self._errors.append(error)
            return None

    def say(self) -> None:
        """Raise one error of all that were kept.

        Raises:
            DataError: there were some.
        """
        if self._errors:
            raise self.error()

    def error(self) -> DataError:
        """Return one error of all that were kept: a line for each, of very many the first ones."""
        if len(self._errors) == 1:
            return self._errors[0]
        more = len(self._errors) - _NUM_NAMED
        named = [str(error) for error in self._errors[:_NUM_NAMED]]
        return DataError("\n".join(named + ([f"and {more:,} more"] if more > 0 else [])))


def pillow() -> Any:
    """Return Pillow's module of images."""
    with needed():
        from PIL import Image
    return Image


@contextmanager
def needed() -> Iterator[None]:
    """Say how to install what is imported here, if it is not installed.

    Raises:
        DataError: it is not.
    """
    try:
        yield
    except ImportError as error:
        raise DataError(
            f'these data need {error.name}, which is not installed: pip install "koi-x[data]"'
        ) from error


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Any]:
    """Open an image file, and say of a failure which file it is."""
    bad = OSError, SyntaxError, ValueError, struct.error, pillow().DecompressionBombError
    try:
        with opened(path) as file, _begun(file) as image:
            if math.prod(image.size) > max_pixels:
                raise DataError(
                    f"the image {path} has {image.width} × {image.height} pixels, and at most "
                    f"{max_pixels:,} are read: make it smaller, or allow more by max_pixels or "
                    f"the environment variable {_VARIABLE}"
                )
            yield image
    except KoiError:
        raise
    except bad as error:  # Pillow raises all of these
        problem = getattr(error, "strerror", None) or str(error)
        if isinstance(error, pillow().UnidentifiedImageError):
            problem = "no image that is known" if path.stat().st_size else "is empty"
        raise DataError(
            f"the image {path} cannot be read ({problem}): replace or remove it"
        ) from error


def _begun(file: IO[bytes]) -> Any:
    """Return an image of which nothing but the header is read, Pillow's own limit put aside."""
    module = pillow()
    before, module.MAX_IMAGE_PIXELS = module.MAX_IMAGE_PIXELS, None
    try:
        return module.open(file, "r", FORMATS)
    finally:
        module.MAX_IMAGE_PIXELS = before


def _check_range(image: Any, name: str) -> None:
    """Check that black and white are known.

    Raises:
        DataError: they are not.
    """
    kinds = {"F": "floating-point numbers", "I": "32-bit numbers"}
    # of a PGM file Pillow itself scales what has more than 8 bits to 16
    if image.mode in kinds and not (image.mode == "I" and image.format == "PPM"):
        raise DataError(
            f"{name} is of {kinds[image.mode]} (mode {image.mode}), of which nothing says what is "
            "black and what white: scale it to 8 or 16 bits, or give a dataset of tensors"
        )


def _upright(image: Any) -> Any:
    """Return the image as it would be seen; a note that cannot be read is none."""
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever is amiss in the note, the image itself has been read
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(pillow().Transpose[turn])


def _upper_bits(image: Any) -> Any:
    """Return grey of 16 bits as grey of 8; one value can stand for what is transparent."""
    content = bytearray(image.convert("I").tobytes())
    values = torch.frombuffer(content, dtype=torch.int32)
    grey = values // 256
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    grey = grey.to(torch.uint8)
    return pillow().frombytes("L", image.size, b"".join(map(bytes, pieces_of(grey))))
