"""What a task is, and how many tasks become one.

A task distribution is any object with ``sample() -> task``; a task is any object with
``loss(model) -> scalar tensor``. Everything else here is optional for a task: data that are
tensors (`tensor_task`), minibatches, a query set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi.errors import ConfigurationError, EngineError, TaskError

_TASK_MARK = "__koi_tensor_task__"
TaskClass = TypeVar("TaskClass", bound=type)


@runtime_checkable
class Task(Protocol):
    """Anything with a loss. It may also have ``minibatches(num_steps)`` and ``query``."""

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
    if not dataclasses.is_dataclass(cls):
        raise ConfigurationError(
            [
                f"@koi.tensor_task was given {cls.__name__}, which is not a dataclass: "
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
    values = ((name, getattr(task, name)) for name in field_names(type(task)))
    return {name: value for name, value in values if isinstance(value, Tensor)}


def with_tensors(task: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``task`` with its tensor fields replaced, its settings kept, __init__ not called."""
    other = object.__new__(type(task))
    for name in field_names(type(task)):
        value = tensors[name] if name in tensors else getattr(task, name)
        object.__setattr__(other, name, value)
    return other


def stack(tasks: Sequence[Any]) -> Any:
    """Return one task whose tensors have the tasks' tensors along a new first dimension.

    Raises:
        EngineError: the tasks are not tensor tasks of one class, differ in their settings, or
            their tensors differ in shape, type or device.
    """
    first = tasks[0]
    names = list(tensors_of(first))
    for task in tasks:
        if type(task) is not type(first):
            raise EngineError(
                f"one meta-batch holds {type(first).__name__} and {type(task).__name__}: "
                "tasks that run at once must be of one class"
            )
    for field in dataclasses.fields(first):
        if field.name not in names and not all(
            _same(getattr(task, field.name), getattr(first, field.name)) for task in tasks
        ):
            raise EngineError(
                f"the field {field.name!r} of {type(first).__name__} is no tensor and differs "
                "between tasks: make it a tensor, or equal in all tasks"
            )
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


def _same(left: Any, right: Any) -> bool:
    try:
        return left is right or bool(left == right)
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

    ``first`` is the number of the first of them, where they are a part of a meta-batch.
    """

    def __init__(
        self, *, tasks: list[Any] | None = None, stacked: Any = None, first: int = 0
    ) -> None:
        self.first = first
        if tasks is not None:
            self.tasks = tasks
        if stacked is not None:
            self.stacked = stacked

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

    def chunks(self, size: int) -> Iterator[tuple[int, TaskBatch]]:
        """Yield at most ``size`` tasks at a time, with the number of the first of them."""
        for start in range(0, len(self), size):
            yield self.first + start, self.part(start, start + size)

    def part(self, start: int, end: int) -> TaskBatch:
        """Return the tasks from ``start`` to before ``end``, as views."""
        if start == 0 and end >= len(self):
            return self
        first = self.first + start
        if "stacked" in self.__dict__:
            rows = {name: tensor[start:end] for name, tensor in tensors_of(self.stacked).items()}
            return TaskBatch(stacked=with_tensors(self.stacked, rows), first=first)
        return TaskBatch(tasks=self.tasks[start:end], first=first)

    def filled(self, size: int) -> TaskBatch:
        """Return these tasks followed by repetitions of the first, ``size`` in all."""
        missing = size - len(self)
        return self if missing <= 0 else TaskBatch(tasks=self.tasks + self.tasks[:1] * missing)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        if "stacked" in self.__dict__:
            return len(next(iter(tensors_of(self.stacked).values())))
        return len(self.tasks)


def views(task: Any, num_steps: int) -> list[Any]:
    """Return the task as each inner step sees it: its minibatches, or itself every time.

    Raises:
        TaskError: ``task.minibatches(num_steps)`` gave fewer than num_steps.
    """
    if not hasattr(task, "minibatches"):
        return [task] * num_steps
    minibatches = list(islice(task.minibatches(num_steps), num_steps))
    if len(minibatches) < num_steps:
        raise TaskError(
            f"minibatches({num_steps}) of {type(task).__name__} gave {len(minibatches)}: it must "
            "give one for each inner step, going through the data again where they run out"
        )
    return minibatches


def query_of(task: Any) -> Any:
    """Return the task on held-out data, or the task itself where it has none."""
    return getattr(task, "query", task)


def outer_view(task: Any, steps: Sequence[Any]) -> Any:
    """Return what FOMAML and MAML differentiate: the query set, else the last step's view."""
    return task.query if hasattr(task, "query") else steps[-1]


def cycled_order(key: Tensor, size: int, batch_size: int, num_steps: int) -> Tensor:
    """Return what examples each inner step sees, shape (num_steps, batch_size), no replacement.

    An endless stream goes through all ``size`` examples, then through all of them again in a new
    random order, and so on; minibatches are cut from it and may span two passes (`_mini_batches`
    in the paper's code). The first pass keeps the order in which the examples lie. Later orders
    are a function of ``key``, an int64 scalar, alone: the same in every engine, and possible
    under ``vmap`` and inside a compiled graph.

    >>> cycled_order(torch.tensor(7), size=4, batch_size=2, num_steps=2).tolist()
    [[0, 1], [2, 3]]
    >>> cycled_order(torch.tensor(7), size=4, batch_size=2, num_steps=6)[2:4].flatten().sort()[0]
    tensor([0, 1, 2, 3])
    """
    needed = num_steps * batch_size
    num_passes = -(-needed // size)
    order = torch.arange(size, device=key.device).unsqueeze(0)
    if num_passes > 1:
        count = torch.arange(size, num_passes * size, device=key.device)
        noise = _mixed(key + count * 0x9E3779B9).reshape(num_passes - 1, size)
        order = torch.cat([order, noise.argsort(dim=1)])
    return order.reshape(-1)[:needed].reshape(num_steps, batch_size)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@tensor_task
@dataclasses.dataclass
class SupervisedTask:
    """Inputs and targets, in a support set to learn from and a query set to be measured on.

    The inner loop minimises ``criterion(model(inputs), targets)`` on minibatches of the support
    set, cycling through it without replacement; `koi.Koi.evaluate` measures it on the query set.

    Args:
        support_inputs: shape (num_support, …), in random order.
        support_targets: shape (num_support, …).
        query_inputs: shape (num_query, …).
        query_targets: shape (num_query, …).
        key: an int64 scalar that orders the second and later passes (see `cycled_order`).
        criterion: (predictions, targets) -> scalar.
        batch_size: examples in each inner step; None, or more than there are: all of them.

    >>> x = torch.linspace(-1, 1, 6).unsqueeze(1)
    >>> task = SupervisedTask(x, 2 * x, x, 2 * x, torch.tensor(0), batch_size=4)
    >>> task.loss(torch.nn.Identity())
    tensor(0.4667)
    >>> [len(step.support_inputs) for step in task.minibatches(3)]
    [4, 4, 4]
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor
    key: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
    batch_size: int | None = None

    def loss(self, model: nn.Module) -> Tensor:
        """Return the criterion on the support set (of a minibatch: on the minibatch)."""
        return self.criterion(model(self.support_inputs), self.support_targets)

    @property
    def query(self) -> SupervisedTask:
        """The same task on its query set."""
        return self._on(self.query_inputs, self.query_targets)

    def minibatches(self, num_steps: int) -> list[SupervisedTask]:
        """Return the task as each of ``num_steps`` inner steps sees it."""
        size = len(self.support_inputs)
        if self.batch_size is None or self.batch_size >= size:
            return [self] * num_steps
        if num_steps * self.batch_size <= size:  # one pass needs no order: slices are views
            inputs: Iterable[Tensor] = self.support_inputs.split(self.batch_size)
            targets: Iterable[Tensor] = self.support_targets.split(self.batch_size)
        else:
            order = cycled_order(self.key, size, self.batch_size, num_steps)
            inputs, targets = self.support_inputs[order], self.support_targets[order]
        pairs = islice(zip(inputs, targets, strict=True), num_steps)
        return [self._on(x, y) for x, y in pairs]

    def _on(self, inputs: Tensor, targets: Tensor) -> SupervisedTask:
        other: SupervisedTask = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.support_inputs, other.support_targets = inputs, targets
        return other
