"""Tasks that are drawn ahead by other processes, with torch's own DataLoader."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from koi.errors import TaskError
from koi.inner.checks.granted import Same
from koi.randomness import Place
from koi.sampling import draw
from koi.tasks import TaskBatch

_PLAIN = (type(None), bool, int, float, str, bytes)
# What is looked at of a distribution for each meta-batch: see `outline`.
_SOME, _MOST, _DEEPEST = 1024, 20_000, 12
_SMALL = 2**20  # bytes of an array that is looked at wholly


class Order(NamedTuple):
    """What is to be drawn of each meta-batch: the arguments of `koi.sampling.draw`."""

    tasks: Any
    num_tasks: int
    part: tuple[int, int]
    whole: bool
    seed: int | None


class Coming(Dataset[bytes]):
    """The meta-batches by number; what a worker gives of each is ready to be sent."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __getitem__(self, number: int) -> bytes:
        tasks, num_tasks, part, whole, seed = self._order
        place = Place(seed, "meta-iteration", number)
        return packed(draw(tasks, num_tasks, place, part, whole=whole))


class Ahead:
    """Workers that draw the next meta-batches, in order.

    A worker has a copy of the distribution, made when it starts; where something in the
    distribution changes, workers start anew. They ignore Ctrl-C and SIGTERM, which may be sent to
    all processes at once: the training ends them.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._key: Any = None
        self._next = -1
        self._coming: Iterator[bytes] | None = None
        self._processes: list[BaseProcess] = []
        self._handler: Any = None

    def take(self, order: Order, number: int) -> TaskBatch:
        """Return the meta-batch of this number.

        Raises:
            TaskError: a worker has died, or a task cannot be sent. What the distribution raises in
                a worker is raised here, with torch's note where it was.
        """
        key = outline(order.tasks), order[1:]
        if self._coming is None or (key, number) != (self._key, self._next):
            self.close()
            self._start(order, number)
        self._key, self._next = key, number + 1
        assert self._coming is not None
        self._check_alive()
        try:
            content = next(self._coming)
        except RuntimeError as error:
            self._check_alive(error)
            raise
        batch: TaskBatch = pickle.loads(content)
        return batch

    def close(self) -> None:
        """End the workers; none is left when this returns."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        with_handler = _can_set_handlers()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if with_handler else None
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        coming._shutdown_workers()  # type: ignore[attr-defined] # there is no public way
        if with_handler:
            signal.signal(signal.SIGCHLD, before if self._handler is None else self._handler)
        self._processes = []

    def _start(self, order: Order, number: int) -> None:
        loader = DataLoader(
            Coming(order),
            batch_size=None,
            sampler=range(number, 2**62),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_prepare,
            generator=torch.Generator(),  # it would draw its seed from the user's
        )
        others = set(multiprocessing.active_children())
        with_handler = _can_set_handlers()
        before = signal.getsignal(signal.SIGCHLD) if with_handler else None
        self._coming = iter(loader)
        self._processes = sorted(
            set(multiprocessing.active_children()) - others, key=lambda process: process.pid or 0
        )
        if with_handler and _is_torchs(after := signal.getsignal(signal.SIGCHLD)):
            # it would raise anywhere, in the midst of a meta-update too
            self._handler = after
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_torchs(before) else before)

    def _check_alive(self, cause: Exception | None = None) -> None:
        """Check that no worker has ended.

        Raises:
            TaskError: naming it.
        """
        for process in self._processes:
            code = process.exitcode
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise TaskError(
                    f"the worker process {process.pid}, one of {self._workers} that draw tasks "
                    f"ahead, {how}: φ is as it was before; if memory ran out, take fewer workers"
                ) from cause


def packed(batch: TaskBatch) -> bytes:
    """Return a meta-batch as bytes.

    Raises:
        TaskError: its tasks cannot be sent to another process.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(batch)
    except Exception as error:
        raise TaskError(
            f"a task {type(batch.example).__name__} cannot be sent from the worker that draws it "
            f"({type(error).__name__}: {error}): let it hold tensors, numbers, and functions and "
            "classes from the top of a module, or use workers=0"
        ) from error
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Sends of a tensor that is a view, such as a row of all data, no more than the view."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is Tensor and value.layout is torch.strided and value.is_leaf
        if plain and value.untyped_storage().nbytes() > value.nbytes:
            return value.detach().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def outline(value: Any) -> list[Any]:
    """Return what is equal while nothing in a distribution has been given another value.

    Of what is large a part is looked at, as it is done for each meta-batch: `_SOME` entries of a
    container, values of a tensor or an array; and no more than `_MOST` objects, `_DEEPEST` deep.

    >>> import types
    >>> tasks = types.SimpleNamespace(level=1, names=["a"])
    >>> before = outline(tasks)
    >>> before == outline(tasks)
    True
    >>> tasks.names[0] = "b"
    >>> before == outline(tasks)
    False
    """
    found: list[Any] = []
    left, seen = [(value, 0)], set()
    while left and len(found) < _MOST:
        part, depth = left.pop()
        if type(part) in _PLAIN:
            found.append((type(part), part.hex() if type(part) is float else part))
            continue
        found.append((Same(part), _values(part)))
        if id(part) in seen or depth == _DEEPEST or isinstance(part, type | torch.nn.Module):
            continue
        seen.add(id(part))
        own = getattr(part, "__dict__", {})
        inside: list[Any] = [*own, *own.values()]
        if isinstance(part, dict | list | tuple | set | frozenset):
            found.append(len(part))
            every = max(1, len(part) // _SOME)
            inside += [*part][::every]
            if isinstance(part, dict):
                inside += [*part.values()][::every]
        left += [(each, depth + 1) for each in inside]
    return found


def _values(part: Any) -> Any:
    """Return what tells whether a tensor or an array was changed in place."""
    if isinstance(part, Tensor):
        return 0 if part.is_inference() else part._version
    is_array = type(part).__module__ == "numpy" and hasattr(part, "tobytes")
    if is_array and part.dtype.kind in "biufc":
        some = part if part.nbytes <= _SMALL else part.reshape(-1)[:: part.size // _SOME]
        return str(part.dtype), part.shape, hashlib.blake2b(some.tobytes()).digest()
    return None


def _as_it_is(value: Any) -> Any:
    return value


def _prepare(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_torchs(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("torch.")


def _can_set_handlers() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
