"""What the compiled engine uses of torch beyond its public names, and what happens without it.

Versions of torch in which all of it was tried are in `_TRIED`; others compile nothing, which
`check_version` says. In a version that is tried, a name that torch takes away costs speed or, where
a graph then cannot be made, ends in the sentence that says so; nothing else in Koi uses such names.
``torch._foreach_*`` are used everywhere: they are the public optimizers' own arithmetic, and the
only way to many tensors at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koi.errors import ConfigurationError, EngineError
from koi.inner.compiled import passes
from koi.inner.compiled import products as kernels
from koi.inner.compiled.passes import (
    is_small,
    join,
    pad,
    sum_of_terms,
    with_memory,
    without_expansions,
)

_TRIED = (2, 11), (2, 14)  # and what is between


def check_version(compile: bool | str) -> None:
    """Check that this torch compiles as Koi knows it.

    Raises:
        ConfigurationError: nobody has tried it.
    """
    first, last = _TRIED
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if not first <= (major, minor) <= last:
        known = " to ".join(".".join(map(str, version)) for version in _TRIED)
        raise ConfigurationError(
            [
                f"compile = {compile!r}: the compiler is known to work with torch {known}, and "
                f"this is torch {torch.__version__}: install one of these, or use compile=False"
            ]
        )


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
def _in_its_place(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``value`` be what ``owner`` calls ``name``, unless it has no such thing."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Scalars(threading.local):
    kept = False


_scalars = _Scalars()


@contextmanager
def scalars_kept() -> Iterator[None]:
    """Let what the compiler makes in this thread write to tensors without dimensions.

    A pass that turns Python's numbers into tensors takes such tensors of float64 for numbers, and
    what is written to them is dropped, without a word: a learned temperature stays where it is.

    Without: the pass is as torch left it.
    """
    owner = importlib.import_module("torch.fx.passes._tensorify_python_scalars")
    asked = getattr(owner, "_is_tensorify_enabled", None)
    if asked is not None and not hasattr(asked, "as_torch_has_it"):

        def enabled() -> bool:
            return not _scalars.kept and bool(asked())

        enabled.as_torch_has_it = asked  # type: ignore[attr-defined]
        owner._is_tensorify_enabled = enabled  # type: ignore[attr-defined]
    before, _scalars.kept = _scalars.kept, True
    try:
        yield
    finally:
        _scalars.kept = before


def kernels_apart() -> AbstractContextManager[None]:
    """Let the compiler make a function of each loop, where the CPU's are all between two products.

    What a function reads and writes is held until it ends, by when it has left the cache.

    Without: functions stay as the compiler likes them, and large networks a tenth slower.
    """
    scheduling = _private("torch._inductor.codegen.cpp", "CppScheduling")
    return _in_its_place(scheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0)


@contextmanager
def quick_build(device: str) -> Iterator[None]:
    """Let the compiler make the same code for a device in less than half the time.

    - g++ is given ``-O2`` in the place of ``-O3``, since loops are written with vectors already,
      and looks as early into small functions, without which bfloat16 is twice as slow.
    - Strides are found by multiplying out, in the place of all that ``sympy.simplify`` tries.
    - What nothing reads any more is not computed before an input is overwritten. Of the Omniglot
      network's 359 loops these were 161, which the compiler wrote first and then dropped.
    - The processor's vectors are tried out beside the tracing, and g++ makes loops and what calls
      them side by side, where they are apart (`koi.inner.compiled.compiler.options_for`).
    - The garbage collector rests: it finds next to nothing in millions of objects.

    Without: it takes longer.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        side_by_side = _side_by_side() if device == "cpu" else nullcontext()
        with _less_of_gcc(), _strides_multiplied_out(), _nothing_unread(), side_by_side:
            yield
    finally:
        if collecting:
            gc.enable()


def _less_of_gcc() -> AbstractContextManager[None]:
    builder = _private("torch._inductor", "cpp_builder")
    flags: Any = getattr(builder, "_get_optimization_cflags", None)

    def fewer(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags(*args, **kwargs)
        if not args[0].endswith("g++") or "clang" in args[0] or "O3" not in compiling:
            return compiling, linking  # another compiler may not know the flags
        rest = [flag for flag in compiling if flag != "O3"]
        return ["O2", "-param early-inlining-insns=14", *rest], linking

    return _in_its_place(builder, "_get_optimization_cflags", fewer)


def _strides_multiplied_out() -> AbstractContextManager[None]:
    sizes = _private("torch._inductor", "sizevars")
    sympy = getattr(sizes, "sympy", None)

    class Sympy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(sympy, "expand" if name == "simplify" else name)

    return _in_its_place(sizes, "sympy", Sympy("sympy"))


@contextmanager
def _nothing_unread() -> Iterator[None]:
    """Let an input be overwritten without computing what read it and is not read itself any more.

    The compiler notes who reads an input, and computes all of them before it is overwritten; here
    only those with a reader from there on.
    """
    lowering = _private("torch._inductor.graph", "GraphLowering")
    box = _private("torch._inductor.ir", "TensorBox")
    run, note = (getattr(lowering, name, None) for name in ("run_node", "register_users_of"))
    if box is None or run is None or note is None:
        yield
        return
    now: list[Any] = [None]

    class Reader(NamedTuple):
        node: Any
        value: Any

        def realize(self) -> None:
            # also what reads it now, and may do so in another order than it is overwritten
            if now[0] is None or any(not user < now[0] for user in self.node.users):
                self.value.realize()

    def run_node(self: Any, node: Any) -> Any:
        before, now[0] = now[0], node
        try:
            return run(self, node)
        finally:
            now[0] = before

    def register_users_of(self: Any, output: Any) -> None:
        if isinstance(output, (list, tuple)):
            for part in output:
                register_users_of(self, part)
        elif isinstance(output, box):
            for name in output.get_read_names():
                self.name_to_users[name].append(Reader(now[0], output))

    with (
        _in_its_place(lowering, "run_node", run_node),
        _in_its_place(lowering, "register_users_of", register_users_of),
    ):
        yield


@contextmanager
def _side_by_side() -> Iterator[None]:
    """Let g++ do at once what does not wait for each other."""
    isa, config = (_private("torch._inductor", name) for name in ("cpu_vec_isa", "config"))
    cache = _private("torch._inductor", "codecache")
    tried, build = (
        getattr(isa, "valid_vec_isa_list", None),
        getattr(cache, "_worker_compile_cpp", None),
    )
    if tried is None or build is None:
        yield
        return

    def trial() -> Any:
        with config.patch({"cpp.vec_isa_ok": True}):  # of this thread alone
            return tried()

    with ThreadPoolExecutor(2) as pool:
        trying = pool.submit(trial)

        def built(lock: str, builders: Sequence[Any]) -> None:
            parts = builders[:-1]  # what the last one links
            if parts:
                with _private("torch.utils._filelock", "FileLock")(lock):
                    missing = [b for b in parts if not os.path.exists(b.get_target_file_path())]
                    list(pool.map(lambda part: part.build(), missing))
            build(lock, builders)

        with (
            _in_its_place(isa, "valid_vec_isa_list", trying.result),
            _in_its_place(cache, "_worker_compile_cpp", built),
        ):
            yield


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

    Without: those of CUDA graphs for the mode that is about them, from torch's documentation.

    Raises:
        EngineError: nobody says what another mode means.
    """
    of_mode = _private("torch._inductor", "list_mode_options")
    if of_mode is not None:
        return dict(of_mode(mode))
    if mode == "reduce-overhead":
        return {"triton.cudagraphs": True}
    raise EngineError(f"this torch does not say what its mode {mode!r} means: use compile=True")


def graph_pass(*, products: bool) -> dict[str, Any]:
    """Return the option with a pass over each graph, before Inductor makes code of it.

    It writes ZeroTensors out as zeros, slices among zeros as padding and, with ``products``, sums
    of products as one, and products with few terms as sums (`koi.inner.compiled.passes`).

    Without: no option; small networks are a twentieth to a tenth slower, and nested derivatives end
    the process.
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
    pattern = CallFunction([torch.ops.aten.mm.default, torch.ops.aten.bmm.default], Arg(), Arg())

    @register_graph_pattern(pattern, pass_dict=patterns, extra_check=is_small)
    def write_out(match: Any, left: Any, right: Any) -> None:
        match.replace_by_example(sum_of_terms, [left, right])

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            with_memory(graph)
            pad(graph)
            if products:
                without_expansions(graph)
                join(graph)
                patterns.apply(graph)
                if kernels.has_kernels():
                    kernels.multiply(graph)

        def uuid(self) -> Any:  # what the compiler's cache knows this pass by
            files = __file__, passes.__file__, kernels.__file__, str(kernels.CODE)
            return get_hash_for_files(files) + bytes([products, kernels.has_kernels()])

    return {"post_grad_custom_pre_pass": Pass()}
