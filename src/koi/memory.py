"""The bytes of tensors, a bounded piece at a time, however large they are."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes that are copied, hashed, written, read or sent at a time.
PIECE = 2**24


def of_this_machine() -> float:
    """Return the bytes of memory that this machine has; infinity where it does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


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
