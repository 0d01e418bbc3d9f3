"""Layers in the forms that are fastest in graphs compiled for the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from koi.inner.checks.granted import is_torchs_own
from koi.inner.compiled.convolution import patches_product


def layers_as_products(module: nn.Module) -> None:
    """Make the linear layers and plain 2-d convolutions of ``module``, a copy, those below.

    Grouped, dilated and otherwise padded convolutions stay as they are.
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
            layer._conv_forward = partial(_convolution, layer)


def _convolution(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    >>> torch.allclose(linear_product(x, w, b), nn.functional.linear(x, w, b), atol=1e-6)
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
