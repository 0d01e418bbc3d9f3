"""The engines that fit a learner as it is now."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from koi import configuration, settings
from koi.inner.base import InnerLoop
from koi.inner.checks.granted import ClassLook, Look, Same, environment
from koi.inner.dispatch import Dispatch
from koi.inner.scaling import LossScale
from koi.phi.parameters import Learned, Tensors

log = logging.getLogger("koi")

# Compiled engines are kept for the case that a change is undone, as of a mode.
_KEPT = 8


class Ready(NamedTuple):
    """Engines, what they were made of, and φ's parameters, buffers and constants."""

    key: Any
    inner: InnerLoop
    engines: Dispatch
    tensors: tuple[Tensors, Tensors, Tensors]


class Engines:
    """Makes engines, and makes them anew where anything that they take for granted has changed.

    That is each setting, what the model holds besides the values of parameters and buffers, and,
    for a graph, what its classes hold and torch's own switches (`koi.inner.checks.granted`).
    """

    def __init__(self) -> None:
        self._look: Look | None = None
        self._kinds: frozenset[type] = frozenset()
        self._classes: dict[frozenset[type], ClassLook] = {}
        self._settings: tuple[int, Any] = (-1, None)
        self._kept: list[Ready] = []
        self._changes = 0  # within one training

    def __reduce__(self) -> Any:
        """Let a copy, or another process, make engines of its own."""
        return Engines, ()

    def ready(
        self, koi: Any, scale: LossScale | None, seeded: bool, before: Ready | None = None
    ) -> Ready:
        """Return the inner loop and the engines for ``koi`` as it is now.

        Args:
            koi: a `koi.Koi`.
            scale: the loss scale of float16.
            seeded: whether draws are a function of place.
            before: what the last meta-iteration of the same training ran with: what it found
                impossible stays so, and where something changes all the time, engines are checked
                after 1, 2, 4, 8 … changes.
        """
        key = self._key(koi, scale, seeded)
        for ready in self._kept:
            if ready.key == key:
                if ready is not self._kept[0]:
                    self._kept.remove(ready)
                    self._kept.insert(0, ready)
                return ready
        self._changes = 0 if before is None else self._changes + 1
        compile = koi.compile
        if compile and self._changes >= _KEPT:
            if self._changes == _KEPT:  # said once
                log.warning(
                    "what a graph takes for granted has changed %d times in this training: running "
                    "uncompiled from here on",
                    self._changes,
                )
            compile = False
        engines = Dispatch(
            koi.model,
            inner := configuration.inner_loop(koi, scale),
            vectorize=koi.vectorize,
            compile=compile,
            chunk_size=koi.chunk_size,
            seeded=seeded,
            check=koi.check and self._changes & (self._changes - 1) == 0,
        )
        if before is not None and before.key[0] == key[0]:
            engines.refused |= before.engines.refused
        learned, model = inner.learned, koi.model
        tensors = (
            *(learned.params_of(model), learned.buffers_of(model)),
            learned.constants_of(model),
        )
        ready = Ready(key, inner, engines, tensors)
        self._kept = [ready, *self._kept[: _KEPT - 1 if koi.compile else 0]]
        return ready

    def _key(self, koi: Any, scale: LossScale | None, seeded: bool) -> Any:
        if self._look is None or self._look.module is not koi.model or not self._look.unchanged():
            Learned.of(koi.model)  # says what cannot be looked at, such as a scripted module
            self._look = Look(koi.model)
            self._kinds = frozenset(map(type, koi.model.modules()))
        if self._settings[0] != koi._changes:
            self._settings = koi._changes, settings.of_engines(koi)
        graph = (self._classes_now(), environment()) if koi.compile else ()
        optimizer = settings.optimizer_now(koi)
        return self._settings[1], optimizer, self._look.held, scale, seeded, graph

    def _classes_now(self) -> Same:
        """Return what stands for all that the classes of the model's parts hold now."""
        if self._kinds not in self._classes:
            self._classes[self._kinds] = ClassLook(self._kinds)
        return self._classes[self._kinds].now()
