"""What is changed in a graph leaves what it computes."""

import functools
from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from koi.inner.compiled.passes import join, without_expansions

aten = torch.ops.aten


def outer(steps, shape=(6, 5), batch=()):
    """Return the factors of products with few terms."""
    rows, columns = shape
    return [
        factor
        for number in range(steps)
        for factor in (
            torch.randn(*batch, 1 + number % 2, rows, dtype=torch.float64),
            torch.randn(*batch, 1 + number % 2, columns, dtype=torch.float64),
        )
    ]


def pairs(factors):
    return zip(factors[::2], factors[1::2], strict=True)


def weight_gradient(*factors):
    """Sum them as autograd does, one after the other."""
    product = torch.bmm if factors[0].dim() == 3 else torch.mm
    return functools.reduce(torch.add, [product(left.mT, right) for left, right in pairs(factors)])


def in_another_order(*factors):
    first, *rest = [left.mT @ right for left, right in pairs(factors)]
    return (rest[0] + first.cos()) + (rest[1] + rest[2])


def one_is_used_twice(*factors):
    first, *rest = [left.mT @ right for left, right in pairs(factors)]
    return first + rest[0] + rest[1], first.sin()


def a_part_is_used(*factors):
    first, *rest = [left.mT @ right for left, right in pairs(factors)]
    part = first + rest[0]
    return part + rest[1] + rest[2], part.sin()


def broadcast(*factors):
    first, *rest = [left.mT @ right for left, right in pairs(factors)]
    return first + rest[0].sum(0) + rest[1] + rest[2][:1]


def times(*factors):
    first, second, third = [left.mT @ right for left, right in pairs(factors)]
    return torch.add(torch.add(first, second, alpha=2), third)


def untransposed(*factors):
    products = [left.mT.contiguous() @ right.sin() for left, right in pairs(factors)]
    return functools.reduce(torch.add, products)


# what is summed, its factors, and how many products are left
SUMS = {
    "wide": (weight_gradient, outer(4), 1),
    "tall": (weight_gradient, outer(4, (5, 6)), 1),
    "two": (weight_gradient, outer(2), 1),
    "of a batch": (weight_gradient, outer(3, batch=(3,)), 1),
    "untransposed": (untransposed, outer(3), 1),
    "with something else": (in_another_order, outer(4), 2),
    "one that is used twice": (one_is_used_twice, outer(3), 2),
    "a part that is used": (a_part_is_used, outer(4), 2),
    "of other shapes": (broadcast, outer(4), 4),
    "times a number": (times, outer(3), 3),
    "one": (weight_gradient, outer(1), 1),
    "larger factors": (weight_gradient, outer(3, (2, 2)), 3),
}


def graph_of(function, given):
    table = torch._decomp.core_aten_decompositions()
    return make_fx(function, decomposition_table=table, tracing_mode="fake")(*given)


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_products_are_joined(name):
    function, given, remaining = SUMS[name]
    traced = graph_of(function, given)
    without_expansions(traced.graph)
    join(traced.graph)
    traced.graph.lint()
    traced.recompile()
    targets = Counter(node.target for node in traced.graph.nodes)
    assert targets[aten.mm.default] + targets[aten.bmm.default] == remaining
    torch.testing.assert_close(traced(*given), function(*given), rtol=1e-12, atol=1e-12)


def test_shapes_that_are_known():
    """As whoever reads the graph next takes them for granted."""
    function, given, _ = SUMS["tall"]
    traced = graph_of(function, given)
    join(traced.graph)
    found = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.op == "call_function":
                found[node] = value.shape, value.stride()
            return value

    Shapes(traced).run(*given)
    for node, (shape, stride) in found.items():
        assert (node.meta["val"].shape, node.meta["val"].stride()) == (shape, stride)


def test_only_expansions_that_change_nothing_go():
    def function(x):
        return x.expand(2, 3).sin() + x[:1].expand(2, 3).sin()

    traced = make_fx(function, tracing_mode="fake")(torch.ones(2, 3))
    without_expansions(traced.graph)
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(aten.expand.default) == 1
    traced.recompile()
    x = torch.randn(2, 3)
    assert torch.equal(traced(x), function(x))
