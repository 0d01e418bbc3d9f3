"""The bytes of tensors, a bounded piece at a time, however large they are."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import math
import os
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes that are copied, hashed, written, read or sent at a time.
PIECE = 2**24

# Of glibc's mallopt(3): its numbers, and the bytes that are set for them.
_MOST_KEPT = {-1: 2**30, -3: 2**28}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def of_this_machine() -> float:
    """Return the bytes of memory that this machine has; infinity where it does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


@functools.cache
def keep_what_is_freed() -> None:
    """Let this process keep freed memory for the next meta-iteration, up to 1 GiB.

    A meta-iteration allocates and frees the same tensors again and again. Where it frees the last
    of them, glibc gives the memory back to the system, which then maps and clears each page anew:
    for the Omniglot network, all tasks at once, 58 MB and a fifth of the time of every
    meta-iteration. What a user has set by the environment stays as it is; other C libraries have
    nothing to set.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    ):
        return
    if platform.libc_ver()[0] == "glibc":
        for option, number in _MOST_KEPT.items():
            ctypes.CDLL(None).mallopt(option, number)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has all its values in memory of its own.

    Sparse and meta tensors have not, nor have subclasses that wrap other tensors.

    >>> is_plain(torch.ones(2)), is_plain(torch.ones(2).to_sparse())
    (True, False)
    """
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return not tensor.numel() or tensor.data_ptr() != 0


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a plain tensor's bytes, each piece good until the next; NumPy need not be installed.

    Of a contiguous tensor on the CPU a piece is its very memory; from another device, or where
    conjugation is still to be done, it is copied, and never the whole tensor.

    >>> [list(piece) for piece in pieces_of(torch.tensor([1, 258], dtype=torch.int16))]
    [[1, 0, 2, 1]]
    """
    flat = tensor.detach().contiguous().view(-1)
    count = max(1, PIECE // tensor.element_size())
    for start in range(0, len(flat), count):
        part = flat[start : start + count].cpu().resolve_conj().resolve_neg()
        # not ctypes.string_at, whose size is a C int
        block = ctypes.c_char * part.nbytes
        yield memoryview(block.from_address(part.data_ptr())).cast("B")


def checksum(file: io.BufferedIOBase, start: bytes = b"") -> str:
    """Return the SHA-256 of ``start`` and of what is left of a file, read in pieces."""
    found = hashlib.sha256(start)
    while piece := file.read(PIECE):
        found.update(piece)
    return found.hexdigest()


def digest(*tensors: Tensor, size: int) -> bytes:
    """Return a hash of the bytes of plain tensors, ``size`` bytes long.

    >>> digest(torch.ones(2), size=4) == digest(torch.ones(1), torch.ones(1), size=4)
    True
    """
    found = hashlib.blake2b(digest_size=size)
    for tensor in tensors:
        for piece in pieces_of(tensor):
            found.update(piece)
    return found.digest()
