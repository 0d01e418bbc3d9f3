"""Signals at the right moment: Ctrl-C between meta-updates, SIGTERM once all is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Handles SIGINT during a training as the program did before, but never inside `held`.

    The handler is set once for the whole training, since setting one costs as much as several
    operations on tensors. Outside the main thread, where Python delivers no signals, nothing is
    done.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._holding = 0  # blocks, one within the other
        self._missed: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish before an interrupt is handled."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            if not self._holding and self._missed is not None:
                missed, self._missed = self._missed, None
                self._handle(*missed)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._missed = number, frame
        elif callable(self._before):
            self._before(number, frame)
        elif self._before == signal.SIG_DFL:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the block finish before Ctrl-C is handled, in a training or not."""
    with Interrupts() as interrupts, interrupts.held():
        yield


class Termination:
    """Holds SIGTERM back until the training has saved itself, then lets it do what it does.

    Where the program has no handler of its own it then ends with the usual code, 143. A program
    that ignores SIGTERM goes on ignoring it.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._set = False
        self._missed: tuple[int, FrameType | None] | None = None

    @property
    def requested(self) -> bool:
        """Whether a SIGTERM waits to be handled."""
        return self._missed is not None

    def __enter__(self) -> Termination:
        before = signal.getsignal(signal.SIGTERM)
        python_handles = before not in (None, signal.SIG_IGN)
        if python_handles and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
            self._set = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._set and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._before)
        self._set = False
        self.let_through()

    def request(self) -> None:
        """Act as if a SIGTERM had come, as it has to another process of the training."""
        if self._set and self._missed is None:
            self._missed = signal.SIGTERM, None

    def let_through(self) -> None:
        """Handle a SIGTERM that waits as the program did before."""
        if self._missed is None:
            return
        missed, self._missed = self._missed, None
        if callable(self._before):
            self._before(*missed)
        else:
            raise SystemExit(128 + signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._missed = number, frame
