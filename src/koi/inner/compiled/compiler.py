"""One function as a graph: what is asked of ``torch.compile``, and how the graph is called."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from koi.errors import EngineError, KoiError
from koi.inner.compiled.torch_internals import (
    graph_pass,
    has_graph,
    kernels_apart,
    options_of,
    quick_build,
    recurrence_traced,
    scalars_kept,
    without_lookup,
)
from koi.inner.layers.libraries import values_unread
from koi.inner.reasons import advice_on, reason_of

log = logging.getLogger("koi")
_numbers = itertools.count()
_LONG = 60  # seconds
_one_at_a_time = threading.RLock()  # what is put in the compiler's place is so for all threads


class Graph:
    """A function that is compiled when it is first called, for what it is then called with.

    The caller answers for it that shapes, types and settings stay as they are. So the compiler's
    own checks, which cost more than a small network's inner step, are left out but for those on
    what user's modules hold globally.

    Args:
        function: what to compile.
        what: what it computes, for the log.
        tasks: the name of the tasks' class, for errors.
        device: "cpu" or "cuda".
        mode: the argument ``compile`` of `koi.Koi`.
        lean: whether it is of large tensors, so that it is to hold few of them at a time.
        context: makes the context in which it is traced; inside of the function the compiler's
            cache would not know it again.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        what: str,
        tasks: str,
        device: str,
        mode: bool | str,
        lean: bool,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._context = context
        self._function = with_own_code(function)
        self._what, self._tasks, self._device = what, tasks, device
        self._checked = False
        self._lean = lean
        options = {**options_for(device, mode, lean), "guard_filter_fn": self._keep}
        self._run: Callable[..., Any] = torch.compile(
            self._function, fullgraph=True, options=options
        )
        self._compiled = False
        self.threadsafe = False  # until there is a graph, which leaves the user's module alone

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph; the first time, which compiles it, with a message.

        Raises:
            EngineError: it cannot be compiled.
        """
        with torch.no_grad():
            if not self._compiled:
                return self._first_run(*inputs)
            if not self.threadsafe:  # the compiler is disabled, and the function itself runs
                with self._context():
                    return self._run(*inputs)
            if not self._checked:
                return self._run(*inputs)
            with scalars_kept():  # it may be compiled anew
                return self._run(*inputs)

    def _first_run(self, *inputs: Any) -> Any:
        log.info("compiling %s: this takes some seconds, once", self._what)
        began = time.perf_counter()
        try:
            with (
                _one_at_a_time,
                said_when_long(self._what),
                self._context(),
                kernels_apart() if self._lean else nullcontext(),
                recurrence_traced(),
                scalars_kept(),
                quick_build(self._device),
                warnings.catch_warnings(),
            ):
                # Inductor goes on without code of its own, and such graphs were seen to crash
                warnings.filterwarnings("error", message=".*code generation for complex")
                result = self._run(*inputs)
        except KoiError:
            raise
        except Exception as error:  # the loss itself has just run without the compiler
            advice = advice_on(error, "use compile=False")
            raise EngineError(
                f"the inner loop of {self._tasks} cannot be compiled ({reason_of(error)}): {advice}"
            ) from error
        log.info("compiled in %.0f s", time.perf_counter() - began)
        self._compiled = True
        self.threadsafe = has_graph(self._function)
        # CUDA graphs learn from the look-up that the results of the last call are done with
        if self._device == "cpu" and not self._checked:
            self._run = without_lookup(self._function) or self._run
        return result

    def _keep(self, entries: Sequence[Any]) -> list[bool]:
        """Choose among the compiler's checks: those on what the user's own modules hold globally.

        All else that a graph takes for granted is in the key that it is found by.
        """
        kept = [entry.has_value and of_the_user(entry.name, entry.value) for entry in entries]
        self._checked = self._checked or any(kept)
        return kept


def of_the_user(name: str, value: Any) -> bool:
    """Return whether the compiler's ``name`` is of something global that the user may change.

    >>> of_the_user("G['__import_mine'].scale", 2.0), of_the_user("G['__import_torch'].pi", 3.14)
    (True, False)
    """
    module = re.search(r"G\['__import_(\w+)'\]", name)
    root = module[1].split("_dot_")[0] if module else "koi"
    if root in ("torch", "koi", "numpy") or root in sys.stdlib_module_names:
        return False
    made_by = getattr(value, "__module__", None) or ""
    return not isinstance(value, types.ModuleType) and not made_by.startswith("torch")


@contextmanager
def said_when_long(what: str) -> Iterator[None]:
    """Say in a warning that it compiles, where that takes so long that it seems to hang."""
    message = "compiling %s has taken %d s so far: it happens once, and may take minutes"
    timer = threading.Timer(_LONG, log.warning, (message, what, _LONG))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class AsItStands:
    """In the place of a `Graph`: the function without the compiler, to compare draws with."""

    threadsafe = False

    def __init__(
        self,
        function: Callable[..., Any],
        context: Callable[[], AbstractContextManager[Any]],
        **_: Any,
    ) -> None:
        self._function, self._context = function, context

    def __call__(self, *inputs: Any) -> Any:
        """Run the function."""
        with torch.no_grad(), self._context(), values_unread():  # which the compiler does not need
            return self._function(*inputs)


def with_own_code(function: Any) -> types.FunctionType:
    """Return ``function`` under a code object and a name of its own.

    The compiler keeps its graphs by code object, and with its checks left out would take one
    engine's graph for another's. By name it remembers what shapes and numbers came before, and
    would make symbols of those that differ from another engine's.
    """
    return types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def options_for(device: str, mode: bool | str, lean: bool = False) -> dict[str, Any]:
    """Return the compiler's options: what pays on the device, then what the mode asks for.

    On the CPU the graph is called through C++, which halves the time of a small network's
    meta-iteration, products and sums are rounded once instead of twice, and small matrix products
    are fused. That g++ knows the processor's vectors is not tried out, and torch's headers are not
    compiled ahead, which takes as long as six graphs repay. A lean graph computes a normalised
    activation again for its gradient (up to eight tensors are read for that) instead of keeping it,
    and what calls its loops is compiled apart from them, which takes half as long and costs a small
    graph speed.
    On CUDA the default is CUDA graphs, and loops are not reordered after they are fused: for the
    graph of 25 sine tasks Inductor stops there with an AssertionError (torch 2.11.0+cu130 on one
    NVIDIA H200, 2026-11-27).
    """
    named = mode if isinstance(mode, str) else ("reduce-overhead" if device == "cuda" else None)
    options: dict[str, Any] = {} if named is None else options_of(named)
    if device == "cuda":
        options["loop_ordering_after_fusion"] = False
    options |= graph_pass(products=device == "cpu")
    if device == "cpu":
        options |= {
            "cpp_wrapper": True,
            "cpp.vec_isa_ok": True,
            "cpp.enable_floating_point_contract_flag": "fast",
        }
        if "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS" not in os.environ:
            options["cpp_cache_precompile_headers"] = False
        if lean:
            options |= {"realize_reads_threshold": 8, "cpp_wrapper_build_separate": True}
    return options
