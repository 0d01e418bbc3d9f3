"""Normalisations in forms that can be mapped over tasks, and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import vjp
from torch.nn import functional as F

from koi.inner.checks.granted import is_torchs_own


def map_normalisation(module: nn.Module, autocast: bool, *, join: bool) -> None:
    """Make BatchNorm in ``module``, a copy to work on, fit for vmap.

    Torch 2.13 cannot map over an input in the lower precision of autocast beside statistics in
    full precision, and in evaluation mode, when compiled, loops over the tasks. Where weights
    differ from task to task it applies them apart, which takes time and memory; with ``join``, and
    without running statistics, all tasks are one operation. The compiler cannot trace that one,
    and joins the operations itself.
    """
    for norm in module.modules():
        if not is_torchs_own(norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            continue
        if norm.running_mean is not None:
            norm.forward = partial(_normalised, norm, norm.forward, autocast)
        elif norm.affine and join:
            norm.forward = partial(_joined, norm)


def map_weight_norm(module: nn.Module) -> None:
    """Make weight norm in ``module``, a copy to work on, fit for a second derivative.

    That of ``torch._weight_norm`` is wrong on the CPU in torch 2.13, by one to fifty per cent. The
    formula is that of Salimans and Kingma (arXiv 1602.07868, eq. 2): w = g v / ‖v‖.
    """
    part: Any
    for part in module.modules():
        if type(part).__qualname__ == "_WeightNorm" and "forward" not in vars(part):
            part.forward = partial(_weight_normalised, part.dim)


def _weight_normalised(dim: int, size: Tensor, direction: Tensor) -> Tensor:
    weight: Tensor = direction * (size / torch.norm_except_dim(direction, 2, dim))
    return weight


def _normalised(
    norm: Any, forward: Callable[[Tensor], Tensor], autocast: bool, input: Tensor
) -> Tensor:
    precise = input.to(norm.running_mean.dtype) if autocast else input
    if norm.training:
        return forward(precise).to(input.dtype)
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    shape = [1, -1] + [1] * (input.dim() - 2)
    output: Tensor = precise * scale.reshape(shape) + shift.reshape(shape)
    return output.to(input.dtype)


def _joined(norm: Any, input: Tensor) -> Tensor:
    norm._check_input_dim(input)
    output: Tensor = JoinedNorm.apply(  # type: ignore[no-untyped-call]
        input, norm.weight, norm.bias, norm.eps
    )
    return output


def normalised_batch(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return BatchNorm by the batch's own statistics, over all but the second dimension."""
    return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)


class JoinedNorm(Function):
    """`normalised_batch`, whose vmap takes the tasks' channels as those of one batch."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return what `normalised_batch` does."""
        return normalised_batch(input, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep the inputs."""
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients; for a loss that takes gradients itself, inside of vmap."""
        forward = partial(normalised_batch, eps=ctx.eps)
        pull_back: Callable[[Tensor], tuple[Tensor, ...]] = vjp(forward, *ctx.saved_tensors)[1]
        return *pull_back(grad), None

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, int]:
        """Return the results of all tasks, which are along the second dimension."""
        size = info.batch_size

        def side_by_side(tensor: Tensor, dim: int | None, at: int) -> Tensor:
            rows = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return rows.movedim(0, at).flatten(at, at + 1)

        joined = normalised_batch(
            side_by_side(input, dims[0], 1),
            side_by_side(weight, dims[1], 0),
            side_by_side(bias, dims[2], 0),
            eps,
        )
        return joined.unflatten(1, (size, -1)), 1
