"""Clipping the gradients of an inner step by their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from koi.phi.arithmetic import squared_norm

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def clipped(
    grads: Sequence[Tensor | None], limit: float, stacked: bool
) -> tuple[Tensor | None, ...]:
    """Return g · min(1, limit / (|g| + 10⁻⁶)), |g| the norm of all gradients of a task together.

    The formula of `torch.nn.utils.clip_grad_norm_`; MAML differentiates through it.

    Args:
        grads: of one task, or with the tasks along the first dimension; None where there is none.
        limit: the largest norm.
        stacked: whether there are many tasks, each of which is clipped by its own norm.

    >>> clipped([torch.tensor([3.0, 4.0]), None], limit=1.0, stacked=False)
    (tensor([0.6000, 0.8000]), None)
    """
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in grads]
    kept = [g for g in dense if g is not None]
    if not kept:
        return tuple(dense)
    squares = squared_norm(kept, stacked=stacked)
    # at zero the root has no slope, and nothing is clipped
    norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    shares = (limit / (norms + _EPS)).clamp(max=1.0)
    return tuple(
        None if g is None else g * shares.view(-1, *[1] * (g.dim() - 1)) if stacked else g * shares
        for g in dense
    )
