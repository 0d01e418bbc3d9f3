"""One training at a time in a folder: a lock that the kernel holds, and frees with the process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

from koi.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_NAME = ".lock"
_HELD = errno.EWOULDBLOCK, errno.EACCES
_open: set[int] = set()  # files of locks, which a fork must not keep for a process that has ended


def _close_all() -> None:
    for handle in _open:
        os.close(handle)
    _open.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_all)


class Lock:
    """A folder's lock, held from `take` to `release`.

    It is the kernel's (``flock``) on a file .lock, in which the holder's name stands for others to
    read: where the holder is killed the file stays and says nothing. Windows, and file systems that
    know no locks, do without.

    Args:
        folder: which may not be there before `take`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _NAME
        self._handle: int | None = None

    def take(self) -> None:
        """Lock the folder.

        Raises:
            CheckpointError: another training has it, which is named.
            OSError: the folder cannot be written to.
        """
        if sys.platform == "win32":
            return
        while self._handle is None:
            # not through a link, as what lies there is emptied
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            _open.add(handle)
            self._handle = handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(handle)
                self._close()
                if error.errno not in _HELD:
                    return  # no locks here
                raise CheckpointError(
                    f"checkpoint_dir {self._folder} is in use by another training ({holder}): "
                    "let that end, or choose another folder"
                ) from None
            if not self._is_there(handle):  # its last holder has just removed it
                self._close()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Unlock the folder, if it was locked."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                if self._is_there(self._handle):
                    self._path.unlink()
            self._close()

    def _is_there(self, handle: int) -> bool:
        """Return whether the file is the one that others find under its name."""
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except OSError:
            return False

    def _close(self) -> None:
        if self._handle in _open:  # not after a fork, in the child
            _open.discard(self._handle)
            os.close(self._handle)
        self._handle = None


def _read(handle: int) -> str:
    """Return who holds a lock; its first moment is before the name is there."""
    return os.pread(handle, 200, 0).decode(errors="replace") or "its process has just begun"
