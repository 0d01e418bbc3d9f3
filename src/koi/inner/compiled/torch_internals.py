"""What the compiled engine uses of torch beyond its public names, and what happens without it.

All of these were seen in torch 2.11 and 2.13. A name that torch takes away costs speed or, where a
graph then cannot be made, ends in the sentence that says so; nothing else in Koi uses such names.
``torch._foreach_*`` are used everywhere: they are the public optimizers' own arithmetic, and the
only way to many tensors at once.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Measured on the sine net: products with up to 16 terms in a sum gain, those with 25 do not.
_MOST_TERMS = 16
_MOST_WORK = 2**16


def _private(module: str, name: str) -> Any:
    """Return what a module of torch calls ``name``, None where there is no such thing."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _entries_of(function: types.FunctionType) -> Sequence[Any] | None:
    """Return what the compiler keeps for ``function``; None where that cannot be asked."""
    ask = _private("torch._C._dynamo.eval_frame", "_debug_get_cache_entry_list")
    return None if ask is None else ask(function.__code__)


def has_graph(function: types.FunctionType) -> bool:
    """Return whether the compiler made a graph of ``function``: not where the user disabled it.

    Without: no, so that tasks do not share threads.
    """
    return bool(_entries_of(function))


def without_lookup(function: types.FunctionType) -> Callable[..., Any] | None:
    """Return what the compiler made of ``function`` when it was called, to be called as it is.

    ``torch.compile`` looks at each call for a graph that fits, which costs as much as an inner
    step of a small network. That is in vain where there is one graph and it takes nothing for
    granted that may change. None where there is no graph, as when the user disabled the compiler.

    Without: None, and each call looks.
    """
    entries = _entries_of(function) or ()
    if len(entries) != 1:
        return None
    return types.FunctionType(
        entries[0].code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


@contextmanager
def kernels_apart() -> Iterator[None]:
    """Let the compiler make a function of each loop, where the CPU's are all between two products.

    What a function reads and writes is held until it ends, by when it has left the cache.

    Without: functions stay as the compiler likes them, and large networks a tenth slower.
    """
    scheduling = _private("torch._inductor.codegen.cpp", "CppScheduling")
    before = getattr(scheduling, "MAX_FUSED_KERNEL_ARGS_NUM", None)
    if before is None:
        yield
        return
    scheduling.MAX_FUSED_KERNEL_ARGS_NUM = 0
    try:
        yield
    finally:
        scheduling.MAX_FUSED_KERNEL_ARGS_NUM = before


def recurrence_traced() -> AbstractContextManager[None]:
    """Let the compiler trace LSTM, GRU and RNN, which it refuses by their class.

    In those of Koi's copy there is nothing but plain operations (`koi.inner.layers.recurrence`);
    the derivative of torch's own kernels, in a subclass, fails to be traced.

    Without: they cannot be compiled, which the error says.
    """
    config = _private("torch._dynamo", "config")
    if not hasattr(config, "allow_rnn"):
        return nullcontext()
    patched: AbstractContextManager[None] = config.patch(allow_rnn=True)
    return patched


def at_fixed_address(tensor: Tensor) -> None:
    """Promise the compiler that a tensor stays where it is, and so may be changed in place.

    Without: a CUDA graph copies it.
    """
    promise = _private("torch._dynamo", "mark_static_address")
    if promise is not None:
        promise(tensor, guard=False)


def options_of(mode: str) -> dict[str, Any]:
    """Return the compiler's options for one of its modes.

    Without: those of CUDA graphs for the mode that is about them, else none.
    """
    of_mode = _private("torch._inductor", "list_mode_options")
    if of_mode is not None:
        return dict(of_mode(mode))
    return {"triton.cudagraphs": True} if mode == "reduce-overhead" else {}


def small_products() -> dict[str, Any]:
    """Return the option with a pass that writes A B with few terms in each sum as that sum.

    The gradient of a linear layer's weight is such a product, with a term for each example of a
    minibatch. As a call of its own it writes the gradient down and the update reads it again; as a
    sum Σₖ A[:, k] B[k, :] it becomes a part of the update.

    Without: no option; small networks are a twentieth to a tenth slower.
    """
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
        from torch._inductor.pattern_matcher import (
            Arg,
            CallFunction,
            PatternMatcherPass,
            register_graph_pattern,
        )
    except ImportError:
        return {}
    patterns = PatternMatcherPass()
    products = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default]
    pattern = CallFunction(products, Arg(), Arg())

    @register_graph_pattern(pattern, pass_dict=patterns, extra_check=_is_small)
    def write_out(match: Any, left: Any, right: Any) -> None:
        match.replace_by_example(sum_of_terms, [left, right])

    class SmallProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            patterns.apply(graph)

        def uuid(self) -> Any:  # what the compiler's cache knows this pass by
            return get_hash_for_files((__file__,))

    return {"post_grad_custom_pre_pass": SmallProducts()}


def _is_small(match: Any) -> bool:
    left, right = (node.meta["val"] for node in match.args)
    sizes: list[int | torch.SymInt] = [*left.shape[-2:], right.shape[-1]]
    known = all(isinstance(size, int) for size in sizes)
    return known and 0 < int(sizes[1]) <= _MOST_TERMS and math.prod(sizes) <= _MOST_WORK


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
