"""Whether an optimizer may step the stacked parameters of many tasks at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from koi.errors import EngineError
from koi.inner.base import InnerLoop
from koi.inner.optimizers.hooks import step_hooks
from koi.inner.optimizers.torch_optimizer import Key, contents, new_optimizer, try_step
from koi.phi.arithmetic import Tensors, clone, difference

# Gradients of very different size show what depends on a norm, or cuts it off.
_SIZES = (0.01, 1.0, 100.0)
_OTHER_TASK = 30.0


class Stepped(NamedTuple):
    """What a few steps give: how far the parameters moved, and what the optimizer keeps."""

    moved: Tensors
    kept: dict[Key, Any]


def check_elementwise(inner: InnerLoop, params: Tensors) -> None:
    """Check that an optimizer treats stacked parameters as it treats each task's own.

    It steps the parameters of two tasks, stacked and apart. Their values do not matter; their
    number, shapes and types may.

    Args:
        inner: the settings.
        params: the model's parameters, which stay as they are.

    Raises:
        ConfigurationError: it cannot step one task's parameters either.
        EngineError: it steps stacked ones otherwise, or hooks would see them.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(param: Tensor) -> Tensor:
        shape = (2, *param.shape)
        return torch.randn(shape, dtype=param.dtype, generator=generator).to(param.device)

    start = [drawn(p) for p in params]
    steps = [[size * drawn(p) for p in params] for size in _SIZES]
    for grad in (grad for grads in steps for grad in grads):
        grad[1] *= _OTHER_TASK

    def task(index: int) -> Stepped:
        own = [[grad[index] for grad in grads] for grads in steps]
        return _after_steps(inner, [s[index] for s in start], own, None)

    optimizer = new_optimizer(inner, [s[0].clone().requires_grad_() for s in start], None)
    name = type(optimizer).__name__
    if any(step_hooks(optimizer)) or _is_wrapped(optimizer):
        raise EngineError(
            f"inner_optimizer gave {name} with step hooks or a wrapped step, which would be called "
            "once for many tasks and see their stacked parameters: use vectorize=False"
        )
    apart = [task(0), task(1)]
    try:
        together = _after_steps(inner, start, steps, 2)
    except EngineError:
        raise
    except Exception as error:
        raise _mixes(name, f" ({error})") from error
    if not _same(together, apart, start):
        raise _mixes(name)


def _mixes(name: str, why: str = "") -> EngineError:
    return EngineError(
        f"{name} does not work element by element{why}, so it cannot step the stacked parameters "
        "of many tasks: choose another inner_optimizer, or vectorize=False"
    )


def _is_wrapped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the user has put something in the place of the step of this one optimizer."""
    step = vars(optimizer).get("step")
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def _after_steps(
    inner: InnerLoop, start: Tensors, steps: list[Tensors], num_tasks: int | None
) -> Stepped:
    params = [p.requires_grad_() for p in clone(start)]
    optimizer = new_optimizer(inner, params, num_tasks)
    for grads in steps:
        try_step(optimizer, params, grads)
    return Stepped(difference(clone(params), start), contents(optimizer, params))


def _same(together: Stepped, apart: list[Stepped], start: Tensors) -> bool:
    """Return whether the rows of what is stacked are each task's, and the rest is everybody's."""
    for index, task in enumerate(apart):
        rows = zip(together.moved, task.moved, start, strict=True)
        if not all(_close(one[index], other, value[index]) for one, other, value in rows):
            return False
        if together.kept.keys() != task.kept.keys():
            return False
        for (owner, name), value in together.kept.items():
            other = torch.as_tensor(task.kept[owner, name])
            one = torch.as_tensor(value)
            stacked = owner < len(start) and one.shape == start[owner].shape
            if not _close(one[index] if stacked else one, other):
                return False
    return True


def _close(one: Tensor, other: Tensor, near: Tensor | None = None) -> bool:
    """Return whether two tensors are the same but for the rounding of them, or of values near."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()) or one.numel() == 0:
        return torch.equal(one, other)
    eps = torch.finfo(one.dtype).eps
    allowed = eps**0.5 * other.abs().max()
    if near is not None:
        allowed = allowed + 16 * eps * near.abs().max()
    return bool((one - other).abs().max() <= allowed)
