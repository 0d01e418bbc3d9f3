"""Layers in the forms that are fastest in graphs compiled for the CPU: products and sums."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi.inner.checks.granted import is_torchs_own

# Patches of more numbers leave the cache between being gathered and being multiplied.
_MOST_PATCHES = 2**19


def layers_as_products(module: nn.Module, *, together: bool = False) -> None:
    """Make the linear layers and plain 2-d convolutions of ``module``, a copy, those below.

    Grouped, dilated and otherwise padded convolutions stay as they are, and of one task those of
    large images: of all tasks ``together`` torch has only a slow one.
    """
    layer: Any
    for layer in module.modules():
        if is_torchs_own(layer, nn.Linear):
            layer.forward = partial(_linear, layer)
        elif (
            is_torchs_own(layer, nn.Conv2d)
            and "_conv_forward" not in vars(layer)
            and layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            layer._conv_forward = partial(_convolution, layer, together)


def _convolution(
    layer: Any, together: bool, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    patches = input.numel() // math.prod(layer.stride) * math.prod(layer.kernel_size)
    if not together and patches > _MOST_PATCHES:
        return F.conv2d(input, weight, bias, layer.stride, layer.padding)
    input, weight = _lowered(input, weight)
    return patches_product(input, weight, bias, layer.stride, layer.padding)


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear_product(*_lowered(input, layer.weight), layer.bias)


def linear_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``linear(input, weight, bias)``, with a single input or output without a product.

    A small product costs less than its call, and sums the compiler fuses with what is beside them.

    Args:
        input: shape (…, C).
        weight: shape (F, C).
        bias: shape (F,), or None.

    Returns:
        Shape (…, F).

    >>> x, w, b = torch.randn(5, 3), torch.randn(1, 3), torch.randn(1)
    >>> torch.allclose(linear_product(x, w, b), F.linear(x, w, b), atol=1e-6)
    True
    """
    if weight.shape[1] == 1:
        output = input * weight[:, 0]
    elif weight.shape[0] == 1:
        output = (input * weight[0]).sum(-1, keepdim=True)
    else:
        output = input @ weight.t()
    if bias is None:
        return output
    # beside a view the compiler takes the bias into the next layer's pass, and not into a call that
    # copies it beforehand
    return (output.unsqueeze(0) + bias.to(output.dtype)).squeeze(0)


def _lowered(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the precision of autocast, where that is on."""
    if not torch.is_autocast_enabled(input.device.type):
        return input, weight
    dtype = torch.get_autocast_dtype(input.device.type)
    return input.to(dtype), weight.to(dtype)


def patches_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """Return ``conv2d(input, weight, bias, stride, padding)`` as one matrix product.

    A task's own weights make many small convolutions of one meta-batch, which the CPU's kernels run
    as a slow grouped one. Gathered patches times weights is a batched matrix product instead, its
    fastest form; the compiler fuses the gathering with its neighbours.

    Args:
        input: shape (N, C, H, W), or (C, H, W).
        weight: shape (F, C, kh, kw).
        bias: shape (F,), or None.
        stride: in rows and columns.
        padding: zeros on both sides, in rows and columns.

    Returns:
        Shape (N, F, H', W') or (F, H', W'), channels last in memory.

    >>> x, w, b = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 2), torch.randn(4)
    >>> expected = F.conv2d(x, w, b, stride=2, padding=(1, 0))
    >>> torch.allclose(patches_product(x, w, b, (2, 2), (1, 0)), expected, atol=1e-5)
    True
    """
    if input.dim() == 3:
        return patches_product(input.unsqueeze(0), weight, bias, stride, padding).squeeze(0)
    (down, right), (pad_h, pad_w) = stride, padding
    num_out, _, kernel_h, kernel_w = weight.shape
    batch, _, height, width = input.shape
    rows = (height + 2 * pad_h - kernel_h) // down + 1
    columns = (width + 2 * pad_w - kernel_w) // right + 1
    # one phase for each place in a stride: their gradients are joined instead of added up
    tall, wide = rows + (kernel_h - 1) // down, columns + (kernel_w - 1) // right
    bottom, side = down * tall - height - pad_h, right * wide - width - pad_w
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, pad_w, side, pad_h, bottom))
    grid = padded.reshape(batch, tall, down, wide, right, -1).permute(2, 4, 0, 1, 3, 5)
    phases = grid.flatten(0, 1).unbind()
    taps = [
        phases[i % down * right + j % right][
            :, i // down : i // down + rows, j // right : j // right + columns
        ]
        for i in range(kernel_h)
        for j in range(kernel_w)
    ]
    patches = torch.cat(taps, dim=-1).reshape(batch * rows * columns, -1)
    matrix = weight.permute(0, 2, 3, 1).reshape(num_out, -1).t()
    if matrix.shape[0] < num_out:
        # decides in which order autograd multiplies for the weights' gradient: 5 times faster here
        matrix = matrix.contiguous()
    output = patches @ matrix
    if bias is not None:
        output = output + bias.to(output.dtype)
    return output.view(batch, rows, columns, num_out).permute(0, 3, 1, 2)
