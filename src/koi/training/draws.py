"""Where meta-iterations get their tasks from: no rank draws more than it must, workers ahead."""

from __future__ import annotations

import copy
import dataclasses
import logging
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from koi import memory
from koi.clients import ClientTasks
from koi.configured import Configured
from koi.errors import ConfigurationError, TaskError
from koi.inner.checks.granted import frozen
from koi.randomness import Place, preserved_generators
from koi.sampling import draw, takes_first
from koi.tasks import TaskBatch
from koi.training.ahead import Ahead, Order

log = logging.getLogger("koi")

_LARGE = 2**16  # elements from which on a copy shares a tensor
_DEEPEST = 8


class Draws:
    """Draws the tasks of meta-iterations.

    Of several ranks each draws its own share alone where the tasks are then those of one process:
    where a draw depends on the seed and the place of the task, which is tried out on a copy of the
    distribution. Any other one draws the whole meta-batch on every rank, as in one process.

    Args:
        koi: the learner.
        tasks: the distribution.
        part: the first of this rank's tasks and the one after the last.
        place: of the first draw.
        workers: processes that draw ahead; 0: this one draws.

    Raises:
        ConfigurationError: `koi.ClientTasks` whose draws depend on more, or workers for such.
        TaskError: ``sample_batch`` gives other tasks where it is asked for a part of them.
    """

    def __init__(
        self, koi: Configured, tasks: Any, part: tuple[int, int], place: Place, workers: int = 0
    ) -> None:
        self.tasks = tasks
        num_tasks = koi.settings.meta_batch_size
        several = part != (0, num_tasks)
        apart = takes_first(tasks) or not hasattr(tasks, "sample_batch")
        tried = bool(workers) or (several and apart)
        why = why_in_order(tasks, num_tasks, part, place) if tried else None
        if workers:
            why = "which refers to the learner" if _refers_to(tasks, koi) else why
            _check_workers(workers, tasks, why)
        self._ahead = Ahead(workers) if workers else None
        self.whole = several and (why is not None or not apart)
        if self.whole and isinstance(tasks, ClientTasks):
            raise ConfigurationError(
                [
                    f"ClientTasks of {type(tasks.tasks).__name__}, {why}: this would be lost "
                    "where a training goes on, as rank 0 alone saves; draw from Python's, NumPy's "
                    "or torch's global generators, which Koi sets"
                ]
            )
        if why is not None:
            name = type(tasks).__name__
            log.info("every rank draws all tasks of a meta-batch of %s, %s", name, why)

    def take(self, num_tasks: int, place: Place, part: tuple[int, int]) -> TaskBatch:
        """Return the tasks of a meta-batch that are this rank's."""
        if self._ahead is None:
            return draw(self.tasks, num_tasks, place, part, whole=self.whole)
        order = Order(self.tasks, num_tasks, part, self.whole, place.seed)
        return self._ahead.take(order, place.number)

    def __enter__(self) -> Draws:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead is not None:
            self._ahead.close()


def _check_workers(workers: int, tasks: Any, why: str | None) -> None:
    """Check that workers give the tasks that would be drawn without them.

    Raises:
        ConfigurationError: they would not.
    """
    if why is not None:
        name = type(tasks.tasks if isinstance(tasks, ClientTasks) else tasks).__name__
        raise ConfigurationError(
            [
                f"workers = {workers} cannot draw the tasks of {name} ahead, {why}: they would be "
                "others than without; draw from Python's, NumPy's or torch's global generators "
                "alone, and let attributes be what can be copied, or use workers=0"
            ]
        )


def _refers_to(tasks: Any, koi: Configured) -> bool:
    return any(part is koi or part is koi.model for part in parts_of(tasks))


def why_in_order(tasks: Any, num_tasks: int, part: tuple[int, int], place: Place) -> str | None:
    """Return why tasks must be drawn one after the other; None: a draw depends on its place alone.

    A copy of the distribution draws some of them twice: that gives the same tasks, and the second
    time changes nothing in it.

    Raises:
        TaskError: ``sample_batch`` gives other tasks where it is asked for a part of them.
    """
    shared = {id(p): p for p in parts_of(tasks) if _size(p) > _LARGE}
    try:
        with warnings.catch_warnings(), preserved_generators(0):
            warnings.simplefilter("ignore")  # of iterators, which Python no longer copies
            tried = copy.deepcopy(tasks, shared)
            first = draw(tried, num_tasks, place, part, whole=False)
            before = frozen(tried)
            again = draw(tried, num_tasks, place, part, whole=False)
            changed = frozen(tried) != before
            whole = draw(tried, num_tasks, place).part(*part) if takes_first(tasks) else first
    except Exception as error:  # which training will meet with, if it is the tasks' own
        return f"of which no copy can be tried ({type(error).__name__}: {error})"
    if changed:
        return "which keeps something from draw to draw"
    if not alike(first.tasks, again.tasks):
        return "which draws from what the seed does not set"
    if not alike(first.tasks, whole.tasks):
        start, end = part
        raise TaskError(
            f"sample_batch({end - start}, first={start}) of {type(tasks).__name__} does not give "
            f"tasks {start} to {end - 1} of sample_batch({num_tasks}, first=0): let task i depend "
            "on the global generator's seed and first + i alone; or take total=, draw for so many, "
            "and return a part; or leave first out"
        )
    return None


def parts_of(value: Any) -> Iterator[Any]:
    """Yield an object and all that can be reached from it by attributes and containers, once."""
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, str | bytes | type | types.ModuleType):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Mapping):
            left += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            left += part
        elif isinstance(part, types.FunctionType):
            left += [cell.cell_contents for cell in part.__closure__ or ()]
        left += getattr(part, "__dict__", {}).values()


def _size(value: Any) -> int:
    """Return how many elements a tensor or an array has; 0 of anything else."""
    if isinstance(value, Tensor):
        return value.numel()
    return value.size if type(value).__module__ == "numpy" and hasattr(value, "tobytes") else 0


def alike(left: Any, right: Any, depth: int = 0) -> bool:
    """Return whether two drawn tasks hold the same, bit for bit.

    >>> import torch
    >>> alike([torch.ones(2), "a"], [torch.ones(2), "a"]), alike(torch.ones(2), torch.ones(1, 2))
    (True, False)
    """
    if left is right:
        return True
    if type(left) is not type(right) or depth > _DEEPEST:
        return False
    if isinstance(left, Tensor):
        other = right.shape, right.dtype, right.device
        same_form = (left.shape, left.dtype, left.device) == other
        if not (same_form and memory.is_plain(left) and memory.is_plain(right)):
            return False
        return memory.digest(left, size=16) == memory.digest(right, size=16)
    if isinstance(left, Mapping):
        pairs = [(left[key], right.get(key)) for key in left] if left.keys() == right.keys() else []
        return len(pairs) == len(right) and all(alike(*pair, depth + 1) for pair in pairs)
    if isinstance(left, list | tuple):
        pairs = list(zip(left, right, strict=False))
        return len(left) == len(right) and all(alike(*pair, depth + 1) for pair in pairs)
    if type(left).__module__ == "numpy" and hasattr(left, "tobytes"):
        form = left.dtype, left.shape
        return form == (right.dtype, right.shape) and left.tobytes() == right.tobytes()
    held = _held(left)
    if held:
        return alike(held, _held(right), depth + 1)
    return bool(left == right)


def _held(value: Any) -> dict[str, Any]:
    """Return the fields and attributes of an object."""
    names = [field.name for field in dataclasses.fields(value)] if _is_data(value) else []
    own = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**own, **getattr(value, "__dict__", {})}


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
