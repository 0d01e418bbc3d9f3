"""Every name that Koi uses of torch beyond its public ones, all of them of the compiler.

Each was seen in torch 2.11 and 2.13, and is looked for where it is used: where a torch has it no
longer, that is slower, or refused by the compiler in its own words, and never different. What the
names are for, and what happens without them, is said beside each.

``torch._foreach_*`` are not here: they are the public optimizers' own arithmetic.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from koi.errors import EngineError
from koi.inner.compiled.layers import is_small_product, sum_of_terms


def _found(module: str, name: str) -> Any:
    """Return what a module of torch has under a name, or None."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _entries(function: types.FunctionType) -> Sequence[Any]:
    """Return what the compiler keeps of a function: nothing where it cannot be asked."""
    entries_of = _found("torch._C._dynamo.eval_frame", "_debug_get_cache_entry_list")
    return entries_of(function.__code__) if entries_of else ()


def has_graph(function: types.FunctionType) -> bool:
    """Return whether the compiler made a graph of ``function``: not where the user disabled it.

    Without the name no: then tasks are not shared between threads.
    """
    return bool(_entries(function))


def without_lookup(function: types.FunctionType) -> Callable[..., Any] | None:
    """Return what the compiler made of ``function`` when it was called, to be called as it is.

    ``torch.compile`` looks at each call for a graph that fits, which is a seventh of a small
    network's meta-iteration. That is in vain where there is one graph and it takes nothing for
    granted that may change. None where there is no graph, as when the user disabled the compiler,
    and without the name: the look-up stays.
    """
    entries = _entries(function)
    code = getattr(entries[0], "code", None) if len(entries) == 1 else None
    if code is None:
        return None
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


@contextmanager
def kernels_apart() -> Iterator[None]:
    """Let the compiler make a function of each loop, where the CPU's are all between two products.

    What a function reads and writes is held until it ends, by when it has left the cache. Without
    the name, functions are as the compiler makes them.
    """
    name = "MAX_FUSED_KERNEL_ARGS_NUM"
    scheduling = _found("torch._inductor.codegen.cpp", "CppScheduling")
    if not hasattr(scheduling, name):
        yield
        return
    before = getattr(scheduling, name)
    setattr(scheduling, name, 0)
    try:
        yield
    finally:
        setattr(scheduling, name, before)


def recurrence_traced() -> AbstractContextManager[None]:
    """Let the compiler trace LSTM, GRU and RNN, which it refuses by their class.

    In those of Koi's copy there is nothing but plain operations (`koi.inner.layers.recurrence`);
    the derivative of torch's own kernels, in a subclass, fails to be traced. Without the name the
    compiler traces them by itself, or says that it does not.
    """
    config = _found("torch._dynamo", "config")
    if not hasattr(config, "allow_rnn"):
        return nullcontext()
    patched: AbstractContextManager[None] = config.patch(allow_rnn=True)
    return patched


def mode_options(mode: str) -> dict[str, Any]:
    """Return the options that ``torch.compile(mode=mode)`` stands for, to add others.

    Without the name CUDA graphs are known, from the documentation of ``torch.compile``.

    Raises:
        EngineError: no other mode is.
    """
    options_of = _found("torch._inductor", "list_mode_options")
    if options_of:
        return dict(options_of(mode))
    if mode == "reduce-overhead":
        return {"triton.cudagraphs": True}
    raise EngineError(f"this torch does not say what its mode {mode!r} means: use compile=True")


def keep_address(tensor: Tensor) -> None:
    """Let a CUDA graph change ``tensor``, which is always the same, in place.

    Without the name the compiler makes no CUDA graph of what changes its inputs.
    """
    mark = _found("torch._dynamo", "mark_static_address")
    if mark:
        mark(tensor, guard=False)


@cache
def small_products_pass() -> Any:
    """Return a pass of the compiler that writes matrix products out where `is_small` says so.

    None without the names: products are calls then.
    """
    matcher = "torch._inductor.pattern_matcher"
    kept = [
        ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
        ("torch._inductor.custom_graph_pass", "get_hash_for_files"),
        *((matcher, name) for name in ("Arg", "CallFunction", "PatternMatcherPass")),
        (matcher, "register_graph_pattern"),
    ]
    names = [_found(*each) for each in kept]
    if None in names:
        return None
    custom_pass, hash_of, argument, call, patterns_pass, register = names
    patterns = patterns_pass()
    products = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default]

    def is_small(match: Any) -> bool:
        left, right = (node.meta["val"].shape for node in match.args)
        return is_small_product(left, right)

    @register(call(products, argument(), argument()), pass_dict=patterns, extra_check=is_small)  # type: ignore[untyped-decorator]
    def write_out(match: Any, left: Any, right: Any) -> None:
        match.replace_by_example(sum_of_terms, [left, right])

    class SmallProducts(custom_pass):  # type: ignore[misc,valid-type]
        """The pass, under a name by which the compiler's cache knows it."""

        def __call__(self, graph: torch.fx.Graph) -> None:
            patterns.apply(graph)

        def uuid(self) -> Any:
            return hash_of((__file__, is_small_product.__code__.co_filename))

    return SmallProducts()
