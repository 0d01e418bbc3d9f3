"""Convolutions as matrix products, for graphs compiled for the CPU.

A task's own convolution weights make many small convolutions of one meta-batch, which the CPU's
convolution kernels run as a slow grouped one. Gathered patches times weights is a batched matrix
product instead, its fastest form; the compiler fuses the gathering with its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def patches_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """Return ``conv2d(input, weight, bias, stride, padding)`` as one matrix product.

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
