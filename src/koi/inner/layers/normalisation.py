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

from koi.errors import EngineError
from koi.inner.checks.granted import is_torchs_own
from koi.ragged import counted_now


def map_normalisation(module: nn.Module, autocast: bool, *, join: bool) -> None:
    """Make BatchNorm in ``module``, a copy to work on, fit for vmap.

    Torch 2.13 cannot map over an input in the lower precision of autocast beside statistics in
    full precision, and in evaluation mode, when compiled, loops over the tasks. Where weights
    differ from task to task it applies them apart, which takes time and memory; with ``join``, and
    without running statistics, all tasks are one operation. The compiler cannot trace that one,
    and joins the operations itself.
    """
    norm: Any
    for norm in module.modules():
        if not is_torchs_own(norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            continue
        if norm.running_mean is not None:
            norm.forward = partial(_normalised, norm, norm.forward, autocast)
        elif norm.affine and join:
            norm.forward = partial(_joined, norm)
        if join:
            norm.forward = partial(_of_examples, norm, norm.forward)
            norm.leaves_padding_out = True


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


def _of_examples(norm: Any, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Normalise by those rows of the batch that are examples, where some are padding."""
    counted = counted_now()
    if counted is None or not (norm.training or norm.running_mean is None):
        return forward(input)
    norm._check_input_dim(input)
    shape = [1, -1] + [1] * (input.dim() - 2)
    dims, inside = [0, *range(2, input.dim())], input[0, 0].numel()
    if len(counted.rows) != len(input) or counted.fewest * inside < 2:
        raise EngineError(
            f"{type(norm).__name__} sees {len(input)} rows of {len(counted.rows)} examples, or a "
            "single number of a task, and cannot leave out the padding of tasks of different "
            "sizes: use vectorize=False"
        )
    full = norm.weight if norm.affine else norm.running_mean
    precise = input if full is None else input.to(full.dtype)
    rows = counted.rows.to(precise.dtype).reshape(-1, *[1] * (input.dim() - 1))
    count = rows.sum() * inside
    mean = (precise * rows).sum(dims) / count
    centred = precise - mean.reshape(shape)
    variance = (centred.square() * rows).sum(dims) / count
    if norm.running_mean is not None:
        _move_statistics(norm, mean.detach(), (variance * count / (count - 1)).detach())
    output: Tensor = centred * (variance + norm.eps).rsqrt().reshape(shape)
    if norm.affine:
        output = output * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return output.to(input.dtype)


@torch.no_grad()
def _move_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.mul_(1 - share).add_(share * mean)
    norm.running_var.mul_(1 - share).add_(share * variance)


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
