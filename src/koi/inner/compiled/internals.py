"""What Koi uses of torch beyond its documented names, as torch 2.13 has it.

``torch._foreach_*`` are not here: they are the public optimizers' own arithmetic.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

__all__ = [
    "has_graph",
    "kernels_apart",
    "recurrence_traced",
    "without_lookup",
]


def has_graph(function: types.FunctionType) -> bool:
    """Return whether the compiler made a graph of ``function``: not where the user disabled it."""
    return bool(_debug_get_cache_entry_list(function.__code__))


def without_lookup(function: types.FunctionType) -> Callable[..., Any] | None:
    """Return what the compiler made of ``function`` when it was called, to be called as it is.

    ``torch.compile`` looks at each call for a graph that fits, which costs as much as an inner
    step of a small network. That is in vain where there is one graph and it takes nothing for
    granted that may change. None where there is no graph, as when the user disabled the compiler.
    """
    entries = _debug_get_cache_entry_list(function.__code__)
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
    """
    from torch._inductor.codegen.cpp import CppScheduling  # takes a second to import

    before = CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
    CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = 0
    try:
        yield
    finally:
        CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = before


def recurrence_traced() -> AbstractContextManager[None]:
    """Let the compiler trace LSTM, GRU and RNN, which it refuses by their class.

    In those of Koi's copy there is nothing but plain operations (`koi.inner.layers.recurrence`);
    the derivative of torch's own kernels, in a subclass, fails to be traced.
    """
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(allow_rnn=True)
    return patched
