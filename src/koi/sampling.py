"""Drawing tasks from a distribution, the user's random generators set before each draw."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from koi.errors import ConfigurationError, TaskError, annotate, is_end, wrong
from koi.randomness import Place
from koi.tasks import (
    TaskBatch,
    everything_of,
    has,
    holds_tensors,
    is_task,
    is_tensor_task,
    settings_of,
    tensors_of,
    unstackable,
    wants_object,
)

# Means are sums in the parameters' own precision, of which a larger weight would leave nothing.
_LARGEST = 1e18


def check_tasks(tasks: Any) -> None:
    """Check that ``tasks`` is a task distribution.

    Raises:
        ConfigurationError: it is not.
    """
    a_class = wants_object(tasks, "sample") or wants_object(tasks, "sample_batch")
    can = callable(getattr(tasks, "sample", None)) or hasattr(tasks, "sample_batch")
    if a_class or not can:
        hint = ""
        if a_class:
            hint = f" (this is its class: give an object, {tasks.__name__}(…))"
        elif hasattr(tasks, "loss"):
            hint = " (this looks like one task: give the object that samples them)"
        problem = wrong("tasks", tasks, "an object with a method sample() -> task")
        raise ConfigurationError([problem + hint])


def check_task(task: Any) -> None:
    """Check that ``task`` is a task.

    Raises:
        ConfigurationError: it is not.
    """
    if not is_task(task):
        hint = ""
        if isinstance(task, type):
            hint = f" (this is a class: give an object, {task.__name__}(…))"
        elif hasattr(task, "sample"):
            hint = " (this looks like many tasks: give one that they sample)"
        problem = wrong("task", task, "an object with a method loss(model) -> scalar tensor")
        raise ConfigurationError([problem + hint])


def draw(
    distribution: Any,
    num_tasks: int,
    place: Place,
    part: tuple[int, int] | None = None,
    *,
    whole: bool = True,
) -> TaskBatch:
    """Draw the tasks of a meta-batch: several at once where there is ``sample_batch``.

    With a seed the global generators are set before the draw: for each task where tasks are drawn
    apart, once where they are drawn together. The caller puts the generators back.

    Args:
        distribution: the user's.
        num_tasks: in the whole meta-batch.
        place: where the draw stands.
        part: the first of the tasks that are wanted and the one after the last; None: all.
        whole: whether the others are drawn, too, as a distribution with a state needs it; if not,
            they are drawn only with a ``sample_batch`` that does not take ``first``.
    """
    start, end = part or (0, num_tasks)
    if hasattr(distribution, "sample_batch") and not (num_tasks == 1 and _has_sample(distribution)):
        whole = whole or not takes_first(distribution)
        first, last = (0, num_tasks) if whole else (start, end)
        place.set("sample")
        stacked = _drawn_together(distribution, num_tasks, first, last - first, place)
        batch = TaskBatch(stacked=stacked, first=first)
    else:
        first, last = (0, num_tasks) if whole else (start, end)
        tasks = [_drawn_apart(distribution, number, place) for number in range(first, last)]
        batch = TaskBatch(tasks=tasks, first=first)
    return batch.part(start - first, end - first)


def weighted(batch: TaskBatch, place: Place) -> TaskBatch:
    """Return the batch, each task to count in the means as its ``weight`` says; without one, as 1.

    Raises:
        TaskError: a weight that is no number, negative, not finite, or out of range.
    """
    example = batch.example  # which may be many in one, of which a property would be another
    if is_tensor_task(example) and getattr(type(example), "weight", None) is None:
        own = everything_of(example)
        stacked = "stacked" in vars(batch)  # of which a field that is None is None for all
        if "weight" not in own or (stacked and own["weight"] is None):
            return batch
    given = [task.weight if has(task, "weight") else None for task in batch.tasks]
    if any(weight is not None for weight in given):
        batch.weights = [
            1.0 if weight is None else _number(weight, f"task {number} of {place}")
            for number, weight in enumerate(given, start=batch.first)
        ]
    return batch


def _number(weight: Any, task: str) -> float:
    value = weight.detach() if isinstance(weight, Tensor) else weight
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0):
        number = float(value.real)
        if number == value and (number == 0 or 1 / _LARGEST <= number <= _LARGEST):
            return number
    shown = f"of shape {tuple(value.shape)}" if getattr(value, "shape", ()) else repr(value)
    raise TaskError(
        f"{task} has a weight {shown}: what a task counts in the mean must be 0, or a number from "
        f"{1 / _LARGEST:g} to {_LARGEST:g}; if the attribute means something else, rename it"
    )


def takes_first(distribution: Any) -> bool:
    """Return whether ``sample_batch(n, first=k)`` can draw tasks k … k + n − 1 alone."""
    method = getattr(distribution, "sample_batch", None)
    return method is not None and "first" in _parameters(method)


def _parameters(method: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a method's parameters, read once: that takes as long as a draw."""
    function = getattr(method, "__func__", method)
    if isinstance(function, types.FunctionType):  # others may have no hash, or hold much
        return _of_function(function)
    return frozenset(inspect.signature(method).parameters)


@functools.lru_cache(maxsize=64)
def _of_function(function: types.FunctionType) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _has_sample(distribution: Any) -> bool:
    return hasattr(distribution, "sample")


def _drawn_apart(distribution: Any, number: int, place: Place) -> Any:
    place.set("sample", number)
    task = asked(distribution.sample, f"task {number} of {place}")
    if not is_task(task):
        if isinstance(task, type):
            raise TaskError(
                f"sample of {type(distribution).__name__} returned the class {task.__name__}: it "
                f"must return an object of it, {task.__name__}(…)"
            )
        raise TaskError(
            f"sample of {type(distribution).__name__} returned {type(task).__name__}, which "
            "has no method loss(model): a task must have one, or adapt(model, num_steps)"
        )
    return task


def _drawn_together(distribution: Any, num_tasks: int, first: int, count: int, place: Place) -> Any:
    method = distribution.sample_batch
    more: dict[str, int] = {}
    if takes_first(distribution):
        places = {"first": first, "total": num_tasks}
        more = {n: v for n, v in places.items() if n in _parameters(method)}
    stacked = asked(method, f"the tasks of {place}", count, **more)
    if not is_tensor_task(stacked):
        raise TaskError(
            f"sample_batch of {type(distribution).__name__} returned "
            f"{type(stacked).__name__}: it must return one tensor task (@koi.tensor_task) "
            "whose tensors have the tasks along their first dimension"
        )
    given = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_of(stacked).values()}
    if given != {count}:
        raise TaskError(
            f"sample_batch({count}) of {type(distribution).__name__} gave "
            f"{' and '.join(map(str, sorted(given))) or 'no'} tasks: every tensor must have "
            f"{count} along its first dimension"
        )
    _check_stacked(stacked)
    return stacked


def _check_stacked(stacked: Any) -> None:
    """Check that all tensors of many tasks in one are fields, of which each task gets its part.

    Raises:
        TaskError: another task, a list or an attribute that is no field holds some, which all
            tasks would share.
    """
    for name, value in settings_of(stacked).items():
        if holds_tensors(value):
            raise TaskError(unstackable(stacked, name, value))


def asked(method: Callable[..., Any], what: str, *arguments: Any, **more: Any) -> Any:
    """Call a distribution's method, saying of an error what was being sampled.

    Raises:
        TaskError: in the place of a StopIteration, which would end a loop somewhere as if all
            was well.
    """
    try:
        return method(*arguments, **more)
    except BaseException as error:
        if is_end(error):
            name = getattr(method, "__qualname__", type(method).__qualname__)
            raise TaskError(
                f"the distribution has no more tasks ({name} raised StopIteration) for {what}: it "
                "must give some as long as it is asked, so go through them again"
            ) from error
        annotate(error, f"while sampling {what}")
        raise
