"""Calls of programs, and threads that share them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from koi.inner.base import explained
from koi.inner.compiled.steps import Program
from koi.randomness import Place


@dataclass(frozen=True)
class Call:
    """A program and what it is to be called with.

    Args:
        place: where this is, for errors.
        first: the number of the first task.
        count: how many tasks it is for.
        program: the program.
        inputs: its arguments.
        shared: whether it may run on another thread: it draws nothing at random, which threads
            would do in any order.
        num_threads: how many threads torch may use for it.
    """

    place: Place
    first: int
    count: int
    program: Program
    inputs: tuple[Any, ...]
    shared: bool
    num_threads: int

    def __call__(self) -> Any:
        """Return what the program gives."""
        with explained(self.place, self.first, self.count), threads(self.num_threads):
            return self.program.run(*self.inputs)


class Workers:
    """Threads that share calls, and evenly the threads that torch may use.

    Two threads in one small operation wait for each other at its end and fetch each other's data;
    each with a task of its own, they do neither. A compiled graph runs without Python's global
    lock.

    Args:
        count: how many calls run at once.
    """

    def __init__(self, count: int) -> None:
        self.num_threads = torch.get_num_threads() // count
        self._count = count
        self._start()

    def __reduce__(self) -> Any:
        """Let a copy begin threads of its own."""
        return Workers, (self._count,)

    def run(self, calls: Iterable[Call]) -> Generator[tuple[Call, Any]]:
        """Yield the calls in their order and what they give, while the next are under way.

        When an error or an interrupt ends this early, no call is left running.
        """
        if self._process != os.getpid():  # a fork has none of the threads
            self._start()
        pending: deque[tuple[Call, Future[Any]]] = deque()
        try:
            for call in calls:
                pending.append((call, self._begin(call)))
                if len(pending) > self._count:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()
            wait([future for _, future in pending])

    def _begin(self, call: Call) -> Future[Any]:
        if call.shared and call.program.threadsafe:
            return self._pool.submit(call)
        # what compiles stays here, where an interrupt ends it
        done: Future[Any] = Future()
        done.set_result(call())
        return done

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self._count, "koi")
        started = threading.Barrier(self._count)

        def begin() -> None:
            torch.get_num_threads()  # a thread's first look at its number sets it as well
            torch.set_num_threads(self.num_threads)
            started.wait()

        # what a thread sets for itself, torch also takes for all that begin later
        with threads(torch.get_num_threads()):
            wait([self._pool.submit(begin) for _ in range(self._count)])


class threads:  # noqa: N801 (reads as a function)
    """A context in which torch uses ``number`` threads for what this thread does."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._number:
            torch.set_num_threads(self._number)

    def __exit__(self, *_: object) -> None:
        if self._before != self._number:
            torch.set_num_threads(self._before)
