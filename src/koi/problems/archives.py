"""Zip archives and arrays from elsewhere: sizes are checked before anything is unpacked."""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from koi.errors import DataError
from koi.fewshot.images import needed
from koi.files import opened
from koi.memory import PIECE

# Those of which so many bytes can be unpacked as are asked for; the others give what they like.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1

MAX_HEADER = 2**16  # bytes of what stands before an array's values


@contextlib.contextmanager
def archive_at(path: Path) -> Iterator[zipfile.ZipFile]:
    """Yield a zip archive, opened to be read.

    Raises:
        DataError: there is none, or it is damaged, as may be found out while it is read.
    """
    broken = zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, NotImplementedError
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (*broken, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        problem = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read ({problem}): it is damaged, or not what its name says; get it "
            "anew"
        ) from error


@contextlib.contextmanager
def member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> Iterator[IO[bytes]]:
    """Yield a file of an archive, which has no more bytes than are allowed.

    Raises:
        DataError: it has more, by the archive's own table, or cannot be unpacked.
        KeyError: there is none of this name.
    """
    info = archive.getinfo(name)
    problem = None
    if info.flag_bits & _ENCRYPTED:
        problem = "is encrypted: unpack it, and give the folder"
    elif info.compress_type not in _METHODS:
        problem = "is neither stored nor deflated: unpack it, and give the folder"
    elif info.file_size > max_bytes:
        problem = (
            f"has {info.file_size:,} bytes, where at most {max_bytes:,} can be meant: get it anew"
        )
    if problem is not None:
        raise DataError(f"{name} in {archive.filename} {problem}")
    with archive.open(info) as file:
        yield file


class ArrayForm(NamedTuple):
    """What an array of an ``.npy`` is, by its header."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: Any

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def array_form(file: IO[bytes]) -> ArrayForm:
    """Return the form of the array whose header begins here, leaving the file at its values.

    Raises:
        ValueError: there is no header of the common kind.
    """
    with needed():
        import numpy
    try:
        version = numpy.lib.format.read_magic(file)
        if version != (1, 0):  # of a later one the header alone may have 4 GB
            raise ValueError(f"an array of format {version}, where (1, 0) is meant")
        form = ArrayForm(*numpy.lib.format.read_array_header_1_0(file))
    except Exception as error:  # what is in a header is parsed as Python
        raise ValueError(f"its header is none: {error}") from error
    if form.dtype.hasobject:
        raise ValueError("it holds Python's objects")
    if form.dtype.itemsize == 0 or any(length < 0 for length in form.shape):
        raise ValueError(f"it has shape {form.shape} and type {form.dtype}")
    return form


def values_of(file: IO[bytes], form: ArrayForm) -> Any:
    """Return an array of this form, whose values begin here and end the file.

    Raises:
        EOFError: there are too few, or too many.
    """
    import numpy

    content = numpy.empty(form.nbytes, numpy.uint8)
    for start in range(0, form.nbytes, PIECE):
        piece = content.data[start : start + PIECE]
        if file.readinto(piece) < len(piece):  # type: ignore[attr-defined]
            raise EOFError("it ends early")
    if file.read(1):  # to the end, where the checksum is compared
        raise EOFError("it goes on after its end")
    order = "F" if form.fortran_order else "C"
    return content.view(form.dtype).reshape(form.shape, order=order)
