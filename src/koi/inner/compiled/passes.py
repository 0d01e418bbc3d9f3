"""What is changed in a graph before code is made of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten

# Measured on the sine net: products with up to 16 terms in a sum gain, those with 25 do not.
_MOST_TERMS = 16
_MOST_WORK = 2**16


def with_memory(graph: Graph) -> None:
    """Make the ZeroTensors of a graph tensors of zeros.

    Torch gives a tangent that is zero, as in a ``torch.func.jvp`` inside another, as a ZeroTensor,
    which has no memory. The code that Inductor makes reads it there: the process ended with SIGSEGV
    (torch 2.11 to 2.13, pytorch/pytorch#190856; docs/tasks.md has it without Koi).
    """
    for node in list(graph.nodes):
        if node.target is aten._efficientzerotensor.default:
            like = node.meta["val"]
            form = {"dtype": like.dtype, "device": like.device}
            with graph.inserting_before(node):
                zeros = graph.call_function(aten.full.default, (node.args[0], 0), form)
            zeros.meta.update(node.meta)
            node.replace_all_uses_with(zeros)
            graph.erase_node(node)


def is_small(match: Any) -> bool:
    """Return whether a product that was found has few terms, and little to do."""
    left, right = (node.meta["val"] for node in match.args)
    sizes: list[int | torch.SymInt] = [*left.shape[-2:], right.shape[-1]]
    known = all(isinstance(size, int) for size in sizes)
    return known and 0 < int(sizes[1]) <= _MOST_TERMS and math.prod(sizes) <= _MOST_WORK


def sum_of_terms(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, shapes (…, M, K) and (…, K, N), as a sum Σₖ A[:, k] B[k, :].

    The gradient of a linear layer's weight is such a product, with a term for each example of a
    minibatch. As a call of its own it writes the gradient down and the update reads it again; as a
    sum it becomes a part of the update.

    >>> left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    >>> torch.allclose(sum_of_terms(left, right), left @ right, atol=1e-6)
    True
    """
    columns, rows = left.unsqueeze(-1).unbind(-2), right.unsqueeze(-3).unbind(-2)
    total = columns[0] * rows[0]
    for column, row in zip(columns[1:], rows[1:], strict=True):
        total = total + column * row
    return total


def pad(graph: Graph) -> None:
    """Make a slice that is put among zeros, as its gradient is, the slice padded with zeros.

    A slice in two dimensions is put in one after the other: two tensors of zeros, and code that
    asks at each place about both. Padding asks once; gathered patches are made of such slices.

    >>> def f(x):
    ...     rows = torch.slice_scatter(torch.zeros(4, 2), x, 0, 1, 3)
    ...     return torch.slice_scatter(torch.zeros(4, 5), rows, 1, 3, 5)
    >>> traced = torch.fx.experimental.proxy_tensor.make_fx(f)(torch.ones(2, 2))
    >>> pad(traced.graph)
    >>> _ = traced.recompile()
    >>> [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    ['constant_pad_nd.default']
    >>> torch.equal(traced(torch.ones(2, 2)), f(torch.ones(2, 2)))
    True
    """
    for node in list(graph.nodes):
        if node.target is not aten.slice_scatter.default or len(node.args) < 5:
            continue
        zeros, source, dim, start, end, *step = node.args
        shape = node.meta["val"].shape
        numbers = [dim, start, end, *shape]
        if not _is_zero(zeros) or step not in ([], [1]) or not all(type(n) is int for n in numbers):
            continue
        size = shape[dim]
        start, end = (min(n if n >= 0 else n + size, size) for n in (start, end))
        if not 0 <= start <= end:
            continue
        around = [0] * (2 * len(shape))  # the last dimension comes first
        place = 2 * (len(shape) - 1 - dim % len(shape))
        around[place : place + 2] = start, size - end
        if _is_padding(source) and len(source.users) == 1:
            source, before = source.args[:2]
            around = [a + b for a, b in zip(around, before, strict=True)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (source, around, 0))
        padded.meta.update(node.meta)
        node.replace_all_uses_with(padded)
    graph.eliminate_dead_code()


def _is_zero(node: Any) -> bool:
    """Return whether a node is a tensor of zeros, of numbers that gradients can be."""
    zeros = node.target is aten.zeros.default
    zeros = zeros or (node.target is aten.full.default and node.args[1] == 0)
    return zeros and bool(node.meta["val"].is_floating_point())


def _is_padding(node: Any) -> bool:
    """Return whether a node is a tensor padded with zeros in every dimension that it names."""
    padding = node.target is aten.constant_pad_nd.default and node.args[2:] == (0,)
    return padding and len(node.args[1]) == 2 * node.meta["val"].dim()
