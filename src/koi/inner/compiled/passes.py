"""What is changed in a graph before code is made of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten

# Written out, products with 10 terms gain on the sine net, those with 25 do not; 16 terms, as an
# attention's heads have, make a transformer's meta-iteration nearly twice as long.
_MOST_TERMS = 10
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


def without_expansions(graph: Graph) -> None:
    """Take out what expands a tensor to the shape that it has, as vmap does for each product."""
    for node in list(graph.nodes):
        if node.target is aten.expand.default and not node.kwargs:
            source = node.args[0]
            if source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def join(graph: Graph) -> None:
    """Make a sum of products, Σₜ Aₜ Bₜ, one: of all Aₜ side by side, and all Bₜ in a column.

    The gradient of a weight that is used at each step of a loop, as an LSTM's, is such a sum. It
    makes a matrix as large as the weight for each step, where what these are made of is smaller.

    >>> def f(a, b, c, d, e, f):
    ...     return a @ b + c @ d + e @ f
    >>> given = [torch.ones(*size) for size in [(4, 1), (1, 5)] * 3]
    >>> traced = torch.fx.experimental.proxy_tensor.make_fx(f)(*given)
    >>> join(traced.graph)
    >>> _ = traced.recompile()
    >>> [node.target for node in traced.graph.nodes].count(torch.ops.aten.mm.default)
    1
    >>> torch.equal(traced(*given), f(*given))
    True
    """
    for node in reversed(list(graph.nodes)):
        if not _is_sum(node) or any(_is_term_of(user, node) for user in node.users):
            continue
        terms = _terms(node)
        kinds: dict[Any, list[Any]] = {}
        for term in terms:
            if _is_larger_than_its_factors(term) and len(term.users) == 1:
                kinds.setdefault(term.target, []).append(term)
        products = max(kinds.values(), key=len, default=[])
        if len(products) < 2:
            continue
        with graph.inserting_before(node):
            total = _joined(graph, products)
            for term in terms:
                if term not in products:
                    total = _made(graph, aten.add.Tensor, (total, term), node.meta["val"])
        node.replace_all_uses_with(total)
    graph.eliminate_dead_code()


def _is_sum(node: Any) -> bool:
    """Return whether a node adds two tensors of its own shape and type."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    values = [getattr(part, "meta", {}).get("val") for part in (node, *node.args)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return len(tensors) == 3 and len({(value.shape, value.dtype) for value in tensors}) == 1


def _is_term_of(total: Any, node: Any) -> bool:
    """Return whether a sum has another as a part of it, which is used for nothing else."""
    return _is_sum(node) and _is_sum(total) and len(node.users) == 1


def _terms(total: Any) -> list[Any]:
    """Return what a sum of sums adds up, from the first on."""
    found, rest = [], list(reversed(total.args))
    while rest:
        term = rest.pop()
        if _is_term_of(total, term):
            rest += reversed(term.args)
        else:
            found.append(term)
    return found


def _is_larger_than_its_factors(node: Any) -> bool:
    """Return whether a node is a product of matrices that have fewer numbers than it has."""
    if node.target not in (aten.mm.default, aten.bmm.default):
        return False
    shapes = [part.meta["val"].shape for part in (*node.args, node)]
    left, right, product = (math.prod(shape) for shape in shapes)
    known = all(type(size) is int for shape in shapes for size in shape)
    return known and left + right < product


def _joined(graph: Graph, products: list[Any]) -> Any:
    """Return one product in the place of a sum of them.

    Gradients come as transposed factors. They are put together as they lie, and of both matrices
    the smaller one is transposed, if need be by computing the transposed product.
    """

    def column(nodes: list[Any]) -> Any:
        value = nodes[0].meta["val"]
        shape = list(value.shape)
        shape[-2] = sum(node.meta["val"].shape[-2] for node in nodes)
        return _made(graph, aten.cat.default, (nodes, -2), value.new_empty(shape))

    lefts = column([_transposed(graph, product.args[0]) for product in products])
    rights = column([product.args[1] for product in products])
    target, value = products[0].target, products[0].meta["val"]
    if value.shape[-2] <= value.shape[-1]:
        return _made(graph, target, (_transposed(graph, lefts), rights), value)
    turned = _made(graph, target, (_transposed(graph, rights), lefts), value.mT.contiguous())
    return _transposed(graph, turned)


def _transposed(graph: Graph, node: Any) -> Any:
    """Return the matrices of a node transposed, or what they are the transposed ones of."""
    *batch, rows, columns = range(node.meta["val"].dim())
    order = [*batch, columns, rows]
    if node.target is aten.permute.default and list(node.args[1]) == order:
        return node.args[0]
    return _made(graph, aten.permute.default, (node, order), node.meta["val"].mT)


def _made(graph: Graph, target: Any, args: tuple[Any, ...], value: Tensor) -> Any:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


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
