"""A pass of the compiler that writes out small matrix products, so that it can fuse them.

Imported by what compiles only: the compiler takes a second to import.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)

# Measured on the sine net: products with up to 16 terms in a sum gain, those with 25 do not.
_MOST_TERMS = 16
_MOST_WORK = 2**16

_PATTERNS = PatternMatcherPass()


class SmallProducts(CustomGraphPass):
    """Writes A B with few terms in each sum as Σₖ A[:, k] B[k, :].

    The gradient of a linear layer's weight is such a product, with a term for each example of a
    minibatch. As a call of its own it writes the gradient down and the update reads it again; as a
    sum it becomes a part of the update.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Write out the products in ``graph``."""
        _PATTERNS.apply(graph)

    def uuid(self) -> Any:
        """Return what the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def _is_small(match: Match) -> bool:
    left, right = (node.meta["val"] for node in match.args)
    sizes: list[int | torch.SymInt] = [*left.shape[-2:], right.shape[-1]]
    known = all(isinstance(size, int) for size in sizes)
    return known and 0 < int(sizes[1]) <= _MOST_TERMS and math.prod(sizes) <= _MOST_WORK


@register_graph_pattern(
    CallFunction([torch.ops.aten.mm.default, torch.ops.aten.bmm.default], Arg(), Arg()),
    pass_dict=_PATTERNS,
    extra_check=_is_small,
)
def _write_out(match: Match, left: fx.Node, right: fx.Node) -> None:
    match.replace_by_example(sum_of_terms, [left, right])


def sum_of_terms(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, shapes (…, M, K) and (…, K, N), as a sum over K.

    >>> left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    >>> torch.allclose(sum_of_terms(left, right), left @ right, atol=1e-6)
    True
    """
    columns, rows = left.unsqueeze(-1).unbind(-2), right.unsqueeze(-3).unbind(-2)
    total = columns[0] * rows[0]
    for column, row in zip(columns[1:], rows[1:], strict=True):
        total = total + column * row
    return total
