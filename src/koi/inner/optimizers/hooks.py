"""What is called before and after an optimizer's step: its own hooks, and everybody's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def step_hooks(optimizer: torch.optim.Optimizer) -> list[dict[int, Any]]:
    """Return the dictionaries that hold them, found by a hook that is taken out again at once.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)])
    >>> any(step_hooks(optimizer))
    False
    >>> handle = optimizer.register_step_post_hook(print)
    >>> any(step_hooks(optimizer))
    True
    """
    handles = [
        optimizer.register_step_pre_hook(_nothing),
        optimizer.register_step_post_hook(_nothing),
        register_optimizer_step_pre_hook(_nothing),
        register_optimizer_step_post_hook(_nothing),
    ]
    hooks = [handle.hooks_dict_ref() or {} for handle in handles]
    for handle in handles:
        handle.remove()
    return hooks


@contextmanager
def hooks_set_aside(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Call no hook when an optimizer steps in the block."""
    hooks = step_hooks(optimizer)
    before = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, kept in zip(hooks, before, strict=True):
            each.update(kept)


def _nothing(*_: Any) -> None:
    """Do nothing at a step."""
