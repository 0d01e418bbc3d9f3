"""``if`` on a tensor's value, where many tasks run as one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from koi.errors import EngineError
from koi.inner.reasons import advice, line_of

# What torch says where a tensor that stands for many tasks is asked whether it is true.
ASKED = "data-dependent control flow"


class CommonBranch(TorchFunctionMode):
    """Lets ``if`` go the way that it goes for every task; where tasks part, an error says so.

    Args:
        tasks: the name of the tasks' class, for the error.

    >>> def size(x):
    ...     return x if x.sum() > 0 else -x
    >>> with CommonBranch("Numbers"):
    ...     torch.func.vmap(size)(torch.tensor([[-1.0, -2.0], [-3.0, 4.0]]))
    Traceback (most recent call last):
    koi.errors.EngineError: the tasks Numbers cannot run all at once (...on which they part...
    >>> with CommonBranch("Numbers"):
    ...     torch.func.vmap(size)(torch.tensor([[-1.0, -2.0], [-3.0, 1.0]]))
    tensor([[ 1.,  2.],
            [ 3., -1.]])
    """

    def __init__(self, tasks: str) -> None:
        super().__init__()
        self._tasks = tasks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what ``if`` asks."""
        if func is not torch.Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        try:
            return bool(OneAnswer.apply(*args))  # type: ignore[no-untyped-call]
        except _PartError:
            raise EngineError(self._parted(traceback.extract_stack())) from None

    def _parted(self, frames: traceback.StackSummary) -> str:
        mend = "write torch.where in the place of if on a tensor's values"
        return (
            f"the tasks {self._tasks} cannot run all at once (data-dependent control flow on which "
            f"they part{line_of(frames)}): {advice(frames, mend, 'use vectorize=False')}"
        )


class _PartError(Exception):
    """The tasks do not agree."""


class OneAnswer(Function):
    """A tensor that is the same for all tasks that are mapped over, as that of one task."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        """Return a copy."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        """Have no gradient: an answer is yes or no."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, dims: tuple[int], value: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        """Return the first task's value, which must be that of all."""
        rows = value.movedim(dims[0], 0) != 0
        alike = OneAnswer.apply((rows == rows[0]).all())  # type: ignore[no-untyped-call]
        if not alike:
            raise _PartError
        one: Tensor = OneAnswer.apply(rows[0])  # type: ignore[no-untyped-call]
        return one, None
