"""What every engine is given, what it gives back, and what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from koi.algorithms import Algorithm
from koi.errors import NonFiniteError, TaskError, annotate, is_end
from koi.inner.optimizers.rules import Layout, OptimizerFactory, UpdateRule
from koi.inner.scaling import LossScale
from koi.phi.arithmetic import Tensors
from koi.phi.learned import Learned
from koi.phi.outcome import Outcome, Phi
from koi.phi.rates import LearnedRates
from koi.randomness import Place
from koi.tasks import TaskBatch, views

# What is measured of a module that was adapted to a task.
Metric = Callable[[nn.Module, Any], Tensor]

SHARED_DRAWS = (
    "the loss or the minibatches draw from Python's or NumPy's random generator, and all tasks at "
    "once would share one draw: draw from torch, or in sample()"
)


@dataclass(frozen=True)
class InnerLoop:
    """The settings of the inner loop, the same for every engine.

    Args:
        learned: the parameters and buffers that a task adapts.
        algorithm: what it asks of the inner loop, and gives back of each task.
        factory: makes the inner optimizer, a callable (params, lr).
        step_size: the learning rate that it is made with, which `koi.phi.outcome.Phi` multiplies.
        rule: the same optimizer as a pure rule; None where it has none.
        autocast: the lower precision of the forward pass; None: the parameters' own.
        skip_nonfinite: leave out a task whose loss or result is not finite, instead of an error.
        scale: the loss scale of float16; None: losses are differentiated as they are.
        layout: how the optimizer groups the parameters; None: as it likes.
        clip: the largest norm of a task's gradient; None: any.
        learned_rates: how rates that φ holds act; None: it holds none.
    """

    learned: Learned
    algorithm: Algorithm
    factory: OptimizerFactory
    step_size: float
    rule: UpdateRule | None
    autocast: torch.dtype | None = None
    skip_nonfinite: bool = False
    scale: LossScale | None = None
    layout: Layout | None = None
    clip: float | None = None
    learned_rates: LearnedRates | None = None

    @property
    def through_steps(self) -> bool:
        """Whether the outer gradient is of what acts inside of the steps, too."""
        return self.algorithm.second_order or self.learned_rates is not None

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which losses are computed."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def attention_kernel(
    inner: InnerLoop, mapped: bool, device_type: str
) -> AbstractContextManager[Any]:
    """Return a context with a kernel for attention that can do what is asked of it.

    Only the plain one can be differentiated twice, and on the CPU mapped over tasks.
    """
    if inner.algorithm.second_order or (mapped and device_type == "cpu"):
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
        return context
    return nullcontext()


class Engine(Protocol):
    """One way to run the inner loop. φ is only read: the engine works on a copy of the module."""

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task from the same start."""

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step, shape (tasks, steps + 1)."""

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""


def metrics_of(
    metric: Metric, model: nn.Module, task: Any, inner: InnerLoop, number: int, place: Place
) -> Tensors:
    """Return what the user's metric gives, in a list that is empty if the task is skipped.

    Args:
        metric: what is called.
        model: the module adapted to the task.
        task: the task.
        inner: the settings, which say whether a task of which nothing finite came is skipped.
        number: the number of the task.
        place: where this is, for the error.

    Raises:
        NonFiniteError: an adapted parameter is not finite.
        TaskError: the metric returned no tensor.
    """
    size = inner.learned.norm([p.detach() for p in inner.learned.params_of(model)])
    if not finite_tasks([[]], [size], number, place, inner.skip_nonfinite):
        return []
    with torch.no_grad():
        value = metric(model, task)
    if not isinstance(value, Tensor):
        raise TaskError(
            f"the metric returned {type(value).__name__}: metric(model, task) must return a "
            "tensor, of the same shape for every task"
        )
    return [value]


def scalar(loss: Any, task: Any, step: int) -> Tensor:
    """Return ``loss`` if it is a scalar tensor.

    Raises:
        TaskError: it is not.
    """
    name = f"loss of {type(task).__name__} at inner step {step}"
    if not isinstance(loss, Tensor):
        raise TaskError(
            f"the {name} is of type {type(loss).__name__}: return the scalar tensor itself, "
            "without .item() or float()"
        )
    if loss.dim() != 0:
        raise TaskError(
            f"the {name} has shape {tuple(loss.shape)}: it must be a scalar, so reduce it, for "
            "example by .mean()"
        )
    if loss.is_complex():
        raise TaskError(f"the {name} is complex: it must be a real number, such as its .abs()")
    return loss


def depends_on_model(loss: Tensor, task: Any, step: int) -> Tensor:
    """Return ``loss`` if it has a gradient.

    Raises:
        TaskError: it has none.
    """
    if not loss.requires_grad:
        raise TaskError(
            f"the loss of {type(task).__name__} at inner step {step} does not depend on the "
            "model's parameters: compute it from the model that loss(model) receives, without "
            "detach() or torch.no_grad()"
        )
    return loss


def finite_tasks(
    losses: list[list[float]], norms: list[float], first: int, place: Place, skip: bool
) -> list[int]:
    """Return which tasks have finite losses at every step and a finite result.

    Args:
        losses: of each task, in the order of its steps; none where they are not known.
        norms: of each task, a norm of what came of it.
        first: the number of the first task.
        place: where this is, for the error.
        skip: leave the others out, instead of an error.

    Raises:
        NonFiniteError: naming the place, the task and the inner step.
    """
    if math.isfinite(sum(map(sum, losses)) + sum(norms)):
        return list(range(len(losses)))
    kept = []
    for row, (values, norm) in enumerate(zip(losses, norms, strict=True)):
        bad = next((k for k, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is None and math.isfinite(norm):
            kept.append(row)
        elif not skip:
            what = "what came of the last step is not finite" if bad is None else "the loss is "
            value = "" if bad is None else values[bad]
            step = len(values) - 1 if bad is None else bad
            where = f"{place}, task {first + row}" + (f", inner step {step}" if values else "")
            raise NonFiniteError(
                f"{what}{value} at {where}: φ is as it was before; try a smaller step_size, or "
                "on_nonfinite='skip' to leave such tasks out"
            )
    return kept


def finite_rows(curves: Tensor, place: Place, inner: InnerLoop) -> Tensors:
    """Return those rows of an evaluation, one for each task, that are finite.

    Args:
        curves: shape (tasks, steps + 1).
        place: where this is, for the error.
        inner: the settings, which say whether the other tasks are skipped.

    Raises:
        NonFiniteError: naming the place, the task and the inner step.
    """
    zeros = [0.0] * len(curves)
    kept = finite_tasks(curves.tolist(), zeros, 0, place, inner.skip_nonfinite)
    return [curves[row] for row in kept]


class explained:  # noqa: N801 (reads as a function)
    """A context that says of an error in its block where it happened.

    It is no ``@contextmanager``: that would take a `TaskError`, which is a RuntimeError, for a
    generator's own way to pass a StopIteration on, and raise the latter.

    Raises:
        TaskError: in the place of a StopIteration, which would end a loop somewhere as if all
            was well.
    """

    def __init__(self, place: Place, first: int, count: int) -> None:
        self._place, self._first, self._last = place, first, first + count - 1

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, NonFiniteError):
            return
        first, last = self._first, self._last
        tasks = f"task {first}" if first == last else f"tasks {first} to {last}, run at once"
        where = f"at {self._place}, {tasks}; φ is as it was before"
        if is_end(error):
            raise TaskError(
                "the loss or the minibatches of a task raised StopIteration: an iterator that "
                f"they read has come to its end, so begin it again there ({where})"
            ) from error
        annotate(error, where)
        if "inference tensor" in str(error).lower():
            annotate(
                error,
                "the task holds tensors that were made under torch.inference_mode(), in which "
                "autograd cannot save them: make tasks under torch.no_grad(), or clone the tensors",
            )


def drawn_views(batch: TaskBatch, num_steps: int, place: Place, first: int) -> list[list[Any]]:
    """Return each task's views, which it draws at random, as the one-by-one engine sees them."""
    each = []
    for number, task in enumerate(batch.tasks, start=first):
        place.set("inner", number)
        each.append(list(views(task, num_steps)))
    place.set("inner loss", first or None)
    return each
