"""Files that are written wholly or not at all, and read only where they end."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def opened(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Return a regular file, opened to be read.

    Raises:
        OSError: there is none, or it is a pipe or a device, which may never end.
    """

    def opener(name: str, flags: int) -> int:
        # without it, opening a pipe would wait for somebody to write
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)  # noqa: SIM115 (closed by who asked)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return file


def content_of(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Return what is in a regular file, of which no more is read than is allowed.

    Raises:
        OSError: as `opened`, or it is larger.
    """
    with opened(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that takes its name once its content has reached the disk, or not at all.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedIOBase]:
    """Yield a file that takes its name once its content has reached the disk, or not at all."""
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def mend(error: OSError) -> str:
    """Return what to do about a file that cannot be written.

    >>> mend(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    'make its folder, or choose another'
    """
    known = {
        errno.ENOENT: "make its folder, or choose another",
        errno.ENOTDIR: "what should be its folder is a file: choose another",
        errno.EEXIST: "a file of that name is there: choose another",
        errno.EISDIR: "it is a folder: choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    full = dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room or choose another folder"
    )
    return (known | full).get(error.errno or 0, "choose a folder that can be written to")


def temporary_name(target: Path) -> Path:
    """Return where this process writes a file before it takes its name."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)
