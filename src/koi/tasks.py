"""What a task is, and how many tasks become one.

A task distribution is any object with ``sample() -> task``; a task is any object with
``loss(model) -> scalar tensor``. Everything else here is optional for a task: data that are
tensors (`tensor_task`), minibatches, a query set.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from koi.errors import ConfigurationError, EngineError, TaskError

_TASK_MARK = "__koi_tensor_task__"
_EXTRAS = "__koi_extras__"  # of a task made by `with_tensors`: what it holds besides its fields
TaskClass = TypeVar("TaskClass", bound=type)


@runtime_checkable
class Task(Protocol):
    """Anything with a loss. It may also have ``minibatches(num_steps)`` and ``query``.

    In the place of a loss it may have ``adapt(model, num_steps)``, an inner loop of its own.
    """

    def loss(self, model: Any) -> Tensor:
        """Return the loss of ``model`` on this task, a scalar tensor."""


@runtime_checkable
class TaskDistribution(Protocol):
    """Anything that samples tasks. It may also have ``sample_batch(n)``, drawing n at once."""

    def sample(self) -> Task:
        """Draw one task."""


def tensor_task(cls: TaskClass) -> TaskClass:
    """Mark a dataclass whose data are tensors, so that many such tasks can run as one.

    ``n`` tasks are stacked field by field: a tensor of shape (…) becomes one of shape (n, …).
    Fields that are not tensors (a batch size, a function) are settings and must be equal in all
    tasks of a meta-batch. ``loss`` is written for one task, as ever; Koi maps it over the stack
    with ``torch.func.vmap``.

    Raises:
        ConfigurationError: ``cls`` is not a dataclass.

    >>> @tensor_task
    ... @dataclasses.dataclass
    ... class Line:
    ...     x: Tensor
    ...     y: Tensor
    ...
    ...     def loss(self, model):
    ...         return (model(self.x) - self.y).square().mean()
    >>> stack([Line(torch.zeros(5, 1), torch.ones(5, 1)) for _ in range(3)]).x.shape
    torch.Size([3, 5, 1])
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        name = getattr(cls, "__name__", repr(cls))
        raise ConfigurationError(
            [
                f"@koi.tensor_task was given {name}, which is not a dataclass: "
                "write @koi.tensor_task above @dataclass"
            ]
        )
    mark(cls)
    return cls


def mark(cls: type) -> None:
    """Keep the names of the fields of ``cls`` in it, where the compiler can read them."""
    setattr(cls, _TASK_MARK, (cls, tuple(field.name for field in dataclasses.fields(cls))))


def field_names(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of a tensor task's class."""
    if getattr(cls, _TASK_MARK)[0] is not cls:  # a subclass without a mark of its own
        mark(cls)
    names: tuple[str, ...] = getattr(cls, _TASK_MARK)[1]
    return names


def is_tensor_task(task: object) -> bool:
    """Return whether the class of ``task`` is marked by `tensor_task`."""
    return hasattr(type(task), _TASK_MARK)


def tensors_of(task: Any) -> dict[str, Tensor]:
    """Return the tensor fields of a tensor task.

    Raises:
        EngineError: ``task`` is none.
    """
    if not is_tensor_task(task):
        raise EngineError(
            f"{type(task).__name__} is not a tensor task: make it a dataclass of tensors marked "
            "@koi.tensor_task"
        )
    fields = {name: getattr(task, name) for name in field_names(type(task))}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def with_tensors(task: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``task`` with its tensor fields replaced, all else kept, __init__ not called."""
    other = object.__new__(type(task))
    everything = {**everything_of(task), **tensors}
    for name, value in everything.items():
        object.__setattr__(other, name, value)
    extras = [name for name in everything if name not in field_names(type(task))]
    if extras:
        object.__setattr__(other, _EXTRAS, extras)
    return other


def everything_of(task: Any) -> dict[str, Any]:
    """Return a tensor task's fields and whatever else was assigned to it."""
    fields = {name: getattr(task, name) for name in field_names(type(task))}
    if torch.compiler.is_compiling():  # before torch 2.13 the compiler cannot list __dict__
        others = getattr(task, _EXTRAS, ())
    else:
        others = [name for name in getattr(task, "__dict__", ()) if name != _EXTRAS]
    return {**fields, **{name: getattr(task, name) for name in others}}


def settings_of(task: Any) -> dict[str, Any]:
    """Return what a tensor task holds that is no field with a tensor."""
    fields = field_names(type(task))
    return {
        name: value
        for name, value in everything_of(task).items()
        if name not in fields or not isinstance(value, Tensor)
    }


def check_fields(task: Any, before: dict[str, Any]) -> None:
    """Check that a loss has not assigned to its task, of which many run as one.

    Raises:
        EngineError: it has, which the next step would not see.
    """
    for name, value in everything_of(task).items():
        if name not in before or before[name] is not value:
            raise EngineError(
                f"the loss of {type(task).__name__} assigns to its field {name!r}, which tasks "
                "that run as one, or compiled, do not keep: use vectorize=False, compile=False"
            )


def stack(tasks: Sequence[Any]) -> Any:
    """Return one task whose tensors have the tasks' tensors along a new first dimension.

    A class with a static method ``of_one_shape(tasks)`` makes of them what can be stacked.

    Raises:
        EngineError: the tasks are not tensor tasks of one class, differ in their settings, or
            their tensors differ in shape, type or device.
    """
    if not isinstance(tasks, Sequence) or len(tasks) == 0:
        raise EngineError(f"stack was given {tasks!r}: it takes a list of one tensor task or more")
    first = tasks[0]
    names = list(tensors_of(first))
    for task in tasks:
        if type(task) is not type(first):
            raise EngineError(
                f"one meta-batch holds {type(first).__name__} and {type(task).__name__}: "
                "tasks that run at once must be of one class"
            )
    if hasattr(type(first), "of_one_shape"):
        tasks = type(first).of_one_shape(tasks)
        first = tasks[0]
        names = list(tensors_of(first))
    settings = settings_of(first)
    if is_tensor_task(settings.get("query")):  # which is mapped with the task, be it one or many
        raise EngineError(_unstackable(first, "query", settings["query"]))
    for task in tasks[1:]:
        others = settings_of(task)
        for name in {**settings, **others}.keys() - set(names):
            if not (name in settings and name in others and _same(settings[name], others[name])):
                raise EngineError(_unstackable(first, name, settings.get(name, others.get(name))))
    stacked = {}
    for name in names:
        try:
            stacked[name] = torch.stack([getattr(task, name) for task in tasks])
        except (RuntimeError, TypeError) as error:
            raise EngineError(
                f"the field {name!r} of {type(first).__name__} cannot be stacked ({error}): "
                "it must have one shape, type and device in all tasks"
            ) from error
    return with_tensors(first, stacked)


def check_stacked(stacked: Any) -> None:
    """Check that all tensors of many tasks in one are fields, of which each task gets its part.

    Raises:
        TaskError: another task, a list or an attribute that is no field holds some, which all
            tasks would share.
    """
    for name, value in settings_of(stacked).items():
        if _holds_tensors(value):
            raise TaskError(_unstackable(stacked, name, value))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) or is_tensor_task(value)


def _unstackable(task: Any, name: str, value: Any) -> str:
    """Return why what a task holds besides tensors keeps it from being stacked."""
    kind = type(task).__name__
    if is_tensor_task(value):
        return (
            f"the field {name!r} of {kind} is a task, which is not stacked with it: make its "
            f"tensors fields of {kind}, and {name!r} a property that returns the task"
        )
    if isinstance(value, Tensor):
        return f"{name!r} of {kind} is a tensor, and no field: declare it, {name}: torch.Tensor"
    if _holds_tensors(value):
        return f"the field {name!r} of {kind} holds tensors and is none: make each of them a field"
    return (
        f"the field {name!r} of {kind} is no tensor and differs between tasks: make it a tensor, "
        "or equal in all tasks"
    )


def _same(left: Any, right: Any) -> bool:
    """Return whether two settings are equal; 1, 1.0 and True are three."""
    try:
        return left is right or (type(left) is type(right) and bool(left == right))
    except (ValueError, RuntimeError):  # arrays compare element by element
        return False


def unstack(stacked: Any) -> list[Any]:
    """Return the tasks that `stack` made one; their tensors are views."""
    columns = {name: tensor.unbind() for name, tensor in tensors_of(stacked).items()}
    return [
        with_tensors(stacked, dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


class TaskBatch:
    """The tasks of a meta-batch, as a list and, where that is possible, stacked into one.

    ``first`` is the number of the first of them, where they are a part of a meta-batch, and
    ``weights`` what each counts in the means; None: all the same.
    """

    def __init__(
        self,
        *,
        tasks: list[Any] | None = None,
        stacked: Any = None,
        first: int = 0,
        weights: list[float] | None = None,
    ) -> None:
        self.first, self.weights = first, weights
        if tasks is not None:
            self.tasks = tasks
            self._size = len(tasks)
        if stacked is not None:
            self.stacked = stacked
            self._size = len(next(iter(tensors_of(stacked).values())))

    @cached_property
    def tasks(self) -> list[Any]:
        """The tasks one by one."""
        return unstack(self.stacked)

    @cached_property
    def stacked(self) -> Any:
        """All tasks as one; raises `EngineError` where they cannot be stacked."""
        return stack(self.tasks)

    @property
    def example(self) -> Any:
        """One of the tasks, or the stack of all: what class they are."""
        return self.stacked if "stacked" in self.__dict__ else self.tasks[0]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the tensors of one of the tasks, whether or not all are stacked."""
        first = 1 if "stacked" in self.__dict__ else 0
        return [tensor.shape[first:] for tensor in tensors_of(self.example).values()]

    def chunks(self, size: int) -> Iterator[tuple[int, TaskBatch]]:
        """Yield at most ``size`` tasks at a time, with the number of the first of them."""
        for start in range(0, len(self), size):
            yield self.first + start, self.part(start, start + size)

    def part(self, start: int, end: int) -> TaskBatch:
        """Return the tasks from ``start`` to before ``end``, as views."""
        if start == 0 and end >= len(self):
            return self
        weights = None if self.weights is None else self.weights[start:end]
        place: dict[str, Any] = {"first": self.first + start, "weights": weights}
        if "stacked" in self.__dict__:
            rows = {name: tensor[start:end] for name, tensor in tensors_of(self.stacked).items()}
            place["stacked"] = with_tensors(self.stacked, rows)
        if "tasks" in self.__dict__:  # which padding has left as they are
            place["tasks"] = self.tasks[start:end]
        return TaskBatch(**place)

    def filled(self, size: int) -> TaskBatch:
        """Return these tasks followed by repetitions of the first, ``size`` in all."""
        missing = size - len(self)
        if missing <= 0:
            return self
        weights = None if self.weights is None else self.weights + self.weights[:1] * missing
        return TaskBatch(tasks=self.tasks + self.tasks[:1] * missing, weights=weights)

    def weights_of(self, rows: Iterable[int]) -> list[float]:
        """Return what the tasks of these rows count in the means."""
        return [1 if self.weights is None else self.weights[row] for row in rows]

    def __len__(self) -> int:
        return self._size


def views(task: Any, num_steps: int) -> Iterable[Any]:
    """Return the task as each inner step sees it: its minibatches, or itself every time.

    A generator of minibatches is read as they are used, so that one is in memory at a time.

    Raises:
        TaskError: ``task.minibatches(num_steps)`` gave fewer than num_steps.
    """
    if not has(task, "minibatches"):
        return [task] * num_steps
    return _enough(task, num_steps)


def _enough(task: Any, num_steps: int) -> Iterator[Any]:
    given = 0
    for view in islice(task.minibatches(num_steps), num_steps):
        given += 1
        yield view
    if given < num_steps:
        raise TaskError(
            f"minibatches({num_steps}) of {type(task).__name__} gave {given}: it must "
            "give one for each inner step, going through the data again where they run out"
        )


def has_own_loop(task: Any) -> bool:
    """Return whether a task adapts a module by itself."""
    return has(task, "adapt") and callable(task.adapt)


def has(task: Any, name: str) -> bool:
    """Return whether a task has something besides a loss; None is nothing.

    A property is there, whatever it raises when it is read: to take an AttributeError of its own
    for its absence would be to measure on the support set, say, without a word.
    """
    return getattr(type(task), name, None) is not None or getattr(task, name, None) is not None


def wants_object(value: Any, method: str) -> bool:
    """Return whether ``value`` is a class whose method needs an object of it.

    >>> wants_object(str, "upper"), wants_object(Task, "loss"), wants_object("a", "upper")
    (False, True, False)
    """
    plain = isinstance(value, type) and inspect.getattr_static(value, method, None)
    return isinstance(plain, types.FunctionType)


def is_task(task: Any) -> bool:
    """Return whether ``task`` has a loss, or an inner loop of its own."""
    if wants_object(task, "loss") or wants_object(task, "adapt"):
        return False
    return callable(getattr(task, "loss", None)) or has_own_loop(task)


def query_of(task: Any) -> Any:
    """Return the task on held-out data, or the task itself where it has none."""
    return outer_view(task, task)


def outer_view(task: Any, last: Any) -> Any:
    """Return what FOMAML and MAML differentiate: the query set, else the last step's view."""
    query = task.query if has(task, "query") else None
    return last if query is None else query
