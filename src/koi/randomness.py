"""Randomness as a function of place.

With a seed, what is drawn depends on the seed and on where the draw stands (meta-iteration, task),
never on how many draws came before. A resumed run, another engine and another rank then see the
same tasks. Tasks draw from the global generators of Python, NumPy and torch; Koi sets those for
the draw and puts them back. Threads have these generators in common: of two that learn or evaluate,
one waits while the other draws.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy
import torch
from torch import Tensor

_STATE_SIZE = 624  # words of a Mersenne twister, which all of them are on the CPU

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a fork has none of the threads, and so none to free the lock
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def alone() -> Iterator[None]:
    """Let no other thread draw from the global generators for a learner while the block runs."""
    with _lock:
        yield


@dataclass(frozen=True)
class Place:
    """Where a draw stands: an activity ("meta-iteration", "evaluation", …) and its number."""

    seed: int | None
    activity: str
    number: int

    def set(self, purpose: str, task: int | None = None) -> None:
        """With a seed, set the global generators for this purpose and task; else leave them."""
        if self.seed is not None:
            set_generators(mix(self.seed, self.activity, self.number, purpose, task))

    def __str__(self) -> str:
        return f"{self.activity} {self.number}"


def mix(seed: int, *where: int | str | None) -> int:
    """Return a 64-bit seed: a hash of the run's seed and the coordinates of one place.

    >>> mix(0, "sample", 17) == mix(0, "sample", 17)
    True
    >>> mix(0, "sample", 17) == mix(0, "sample", 18)
    False
    """
    text = repr((seed, *where)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def split_mix(numbers: Tensor) -> Tensor:
    """Return SplitMix64's output function (Steele, Lea, Flood 2014) of int64 numbers.

    A bijection: different numbers have different values, so that an order of the values is a draw
    without replacement. Whole numbers, which wrap, are the same on every device.

    >>> split_mix(torch.tensor([1, 2])).tolist()
    [6238072747940578789, -2606959012126976886]
    """
    numbers = (numbers ^ _shifted(numbers, 30)) * -4658895280553007687
    numbers = (numbers ^ _shifted(numbers, 27)) * -7723592293110705685
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


_numpys_own = numpy.random.mtrand._rand


class _NumPys:
    """NumPy's global generator, whose state takes NumPy 60 µs to read, and again to write.

    So what it has in memory is compared with what it was: the words and the position of its
    Mersenne twister, and the object around it, which keeps a second normal number for the next
    draw. Where only the twister has moved it is moved back.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, Any] = None, None  # a state: in memory, and as NumPy has it
        self._seeded: Any = None

    def seed(self, words: tuple[int, int]) -> None:
        """Seed it."""
        numpy.random.seed(words)
        self._seeded = self._memory()

    def state(self) -> Any:
        """Return what `set_state` takes, which nobody may change."""
        memory = self._memory()
        if memory is None or memory != self._known[0]:
            _, words, position, *_ = state = cast(Any, numpy.random.get_state())
            as_read = memory and memory[0] == words.tobytes() + position.to_bytes(4, sys.byteorder)
            self._known = memory if as_read else None, state
        return self._known[1]

    def set_state(self, state: Any) -> None:
        """Put it into a state."""
        (memory, known), now = self._known, self._memory()
        known_here = memory and state is known
        if known_here and now and now == self._seeded and now[1] == memory[1]:
            ctypes.memmove(self._twister(), memory[0], len(memory[0]))
        else:
            numpy.random.set_state(state)

    def _memory(self) -> tuple[bytes, bytes] | None:
        """Return what the twister, and the object around it, hold; None: it is not a twister."""
        if type(_numpys_own._bit_generator) is not numpy.random.MT19937:
            return None
        header = object.__basicsize__  # which counts the references
        length = type(_numpys_own).__basicsize__ - header
        content = ctypes.string_at(id(_numpys_own) + header, length)
        return ctypes.string_at(self._twister(), 4 * (_STATE_SIZE + 1)), content

    def _twister(self) -> int:
        """Return where the twister's words are."""
        return cast(int, _numpys_own._bit_generator.ctypes.state_address)


_numpys = _NumPys()


def set_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    _numpys.seed((seed & 0xFFFFFFFF, seed >> 32))
    # torch.manual_seed also visits every backend that could exist: 100 µs, against 1 µs
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class States(NamedTuple):
    """The states of all global generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor] | None


def capture() -> States:
    """Return the states of the global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return States(random.getstate(), _numpys.state(), torch.get_rng_state(), cuda)


def checked(states: States) -> States:
    """Return states that were stored, if generators can be put into them.

    Raises:
        TypeError, ValueError, RuntimeError: they cannot. NumPy and torch look at some of it only,
            and would draw from beyond the state's end.
    """
    random.Random().setstate(states.python)
    torch.Generator().set_state(states.torch)
    left, seeded, position = struct.unpack_from("=iiQ", bytes(states.torch[8:24].tolist()))
    fresh, used = (left, position) == (1, 0), left + position == _STATE_SIZE + 1
    if not (seeded and (fresh or used)):
        raise ValueError("the state of torch's generator has no such position")
    if states.numpy is not None:
        name, key, position, has_gauss, gauss = states.numpy
        known = name == "MT19937" and has_gauss in (0, 1) and type(gauss) is float
        if not (known and len(key) == _STATE_SIZE and position in range(_STATE_SIZE + 1)):
            raise ValueError("the state of NumPy's generator has no such position")
    if not all(isinstance(state, Tensor) for state in states.cuda or []):
        raise TypeError("the state of CUDA's generators is no tensor")
    return states


def same_host_draws(left: States, right: States) -> bool:
    """Return whether nothing was drawn from Python's and NumPy's generators in between."""
    same_numpy = left.numpy is None or (
        (left.numpy[1] == right.numpy[1]).all() and left.numpy[2:] == right.numpy[2:]
    )
    return bool(left.python == right.python and same_numpy)


def same_states(left: States, right: States) -> bool:
    """Return whether nothing was drawn from any global generator in between."""
    return same_host_draws(left, right) and torch.equal(left.torch, right.torch)


def restore(states: States) -> None:
    """Put the global generators back into ``states``."""
    random.setstate(states.python)
    torch.set_rng_state(states.torch)
    if states.cuda is not None:  # in a checkpoint they may be of a machine with more devices
        torch.cuda.set_rng_state_all(states.cuda[: torch.cuda.device_count()])
    if states.numpy is not None:
        _numpys.set_state(states.numpy)


@contextmanager
def preserved_generators(seed: int | None) -> Iterator[None]:
    """Leave the global generators as they were, where a seed makes Koi set them.

    With or without a seed it is in the block `alone`.
    """
    with alone():
        if seed is None:
            yield
            return
        states = capture()
        try:
            yield
        finally:
            restore(states)
