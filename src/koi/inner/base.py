"""What every engine is given, what it gives back, and what it checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from koi.errors import NonFiniteError, TaskError, annotate
from koi.inner.optimizers import Layout, OptimizerFactory, UpdateRule
from koi.inner.scaling import LossScale
from koi.parameters import Learned
from koi.randomness import Place
from koi.state import Outcome, Phi
from koi.tasks import TaskBatch, views

# What is measured of a module that was adapted to a task.
Metric = Callable[[nn.Module, Any], Tensor]

SHARED_DRAWS = (
    "the loss or the minibatches draw from Python's or NumPy's random generator, and all tasks at "
    "once would share one draw: draw from torch, or in sample()"
)

_ADVICE = {
    ".item()": "keep tensors as they are, without .item(), float() or if on their values",
    "data-dependent": "write torch.where in the place of if on a tensor's values",
    # a tensor that stands for many tasks has no memory that NumPy could read
    "data pointer": "compute with torch, or in sample(), what is now computed with NumPy",
}


@dataclass(frozen=True)
class InnerLoop:
    """The settings of the inner loop, the same for every engine.

    Args:
        learned: the parameters and buffers that a task adapts.
        algorithm: "reptile", "fomaml" or "maml": what a meta-batch gives back.
        factory: makes the inner optimizer, a callable (params, lr).
        step_size: its learning rate.
        rule: the same optimizer as a pure rule; None where it has none.
        autocast: the lower precision of the forward pass; None: the parameters' own.
        skip_nonfinite: leave out a task whose loss or result is not finite, instead of an error.
        scale: the loss scale of float16; None: losses are differentiated as they are.
        layout: how the optimizer groups the parameters; None: as it likes.
    """

    learned: Learned
    algorithm: str
    factory: OptimizerFactory
    step_size: float
    rule: UpdateRule | None
    autocast: torch.dtype | None = None
    skip_nonfinite: bool = False
    scale: LossScale | None = None
    layout: Layout | None = None

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
    if inner.algorithm == "maml" or (mapped and device_type == "cpu"):
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
    ) -> Tensor:
        """Return ``metric(adapted module, task)`` of each task, shape (tasks, …)."""


def measured(metric: Metric, model: nn.Module, task: Any) -> Tensor:
    """Return what the user's metric gives, which must be a tensor.

    Raises:
        TaskError: it is none.
    """
    with torch.no_grad():
        value = metric(model, task)
    if not isinstance(value, Tensor):
        raise TaskError(
            f"the metric returned {type(value).__name__}: metric(model, task) must return a "
            "tensor, of the same shape for every task"
        )
    return value


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
        losses: of each task, in the order of its steps.
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
            raise NonFiniteError(
                f"{what}{value} at {place}, task {first + row}, inner step {step}: φ is as it was "
                "before; try a smaller step_size, or on_nonfinite='skip' to leave such tasks out"
            )
    return kept


@contextmanager
def explained(place: Place, first: int, count: int) -> Iterator[None]:
    """Say of an error in the block where it happened."""
    try:
        yield
    except NonFiniteError:
        raise
    except BaseException as error:
        last = first + count - 1
        tasks = f"task {first}" if count == 1 else f"tasks {first} to {last}, run at once"
        annotate(error, f"at {place}, {tasks}; φ is as it was before")
        raise


def drawn_views(batch: TaskBatch, num_steps: int, place: Place, first: int) -> list[list[Any]]:
    """Return each task's views, which it draws at random, as the one-by-one engine sees them."""
    each = []
    for number, task in enumerate(batch.tasks, start=first):
        place.set("inner", number)
        each.append(list(views(task, num_steps)))
    place.set("inner loss", first or None)
    return each


def reason_of(error: Exception) -> str:
    r"""Return in one line why torch could not map or compile a loss.

    >>> reason_of(RuntimeError("backend='inductor' raised:\nNotImplementedError: as_strided"))
    'NotImplementedError: as_strided'
    """
    explained = re.search(r"Explanation: (.*)", str(error))
    if explained:
        return explained[1]
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    named = [line for line in lines if not line.endswith("raised:")]
    return named[0] if named else type(error).__name__


def advice_on(error: Exception, otherwise: str) -> str:
    """Return what to change in a loss that torch could not map or compile."""
    return next((text for sign, text in _ADVICE.items() if sign in str(error)), otherwise)
