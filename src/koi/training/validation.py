"""Validation over a training: on what, how often, the best φ, and when there is no more to gain."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from koi.configured import Configured
from koi.errors import CheckpointError, ConfigurationError, wrong
from koi.phi.arithmetic import Tensors, clone, copy_, same_shapes
from koi.ranks.group import Ranks
from koi.settings import check_count
from koi.training import checkpoint
from koi.training.folder import Folder
from koi.training.interrupts import uninterrupted
from koi.training.state import Best, TrainingState

log = logging.getLogger("koi")


class Validation:
    """Measures φ every so often, keeps the best, and knows when patience has run out.

    Args:
        koi: the learner.
        state: what it has come to.
        validate: tasks, or a callable of the learner that returns a number, the smaller the better;
            None: nothing is measured.
        loss: returns the mean query loss after adaptation to tasks, always the same.
        every: meta-iterations from one measurement to the next; the last is measured, too.
        keep_best: whether φ is the best that was measured when the training ends.
        patience: measurements in a row without a new best, after which the training ends; None:
            any number.
        folder: where the best is kept as a checkpoint; None: in memory alone.

    Raises:
        ConfigurationError: numbers that cannot work.
    """

    def __init__(
        self,
        koi: Configured,
        state: TrainingState,
        validate: Any,
        loss: Callable[[Any], float],
        every: int,
        keep_best: bool,
        patience: int | None,
        folder: Folder | None,
    ) -> None:
        check_count("validate_every", every)
        if patience is not None:
            check_count("patience", patience)
            if validate is None:
                raise ConfigurationError(["patience was given without validate: give both"])
        if not isinstance(keep_best, bool):
            raise ConfigurationError([wrong("keep_best", keep_best, "True or False")])
        if not (validate is None or hasattr(validate, "sample") or callable(validate)):
            allowed = "tasks, or a callable (koi) that returns a number, the smaller the better"
            raise ConfigurationError([wrong("validate", validate, allowed)])
        if validate is not None and koi.settings.learned(koi.model).shards is not None:
            raise ConfigurationError(
                [
                    "validate measures on one rank, where a sharded model is not: let a callback "
                    "on all ranks call koi.evaluate"
                ]
            )
        self._koi, self._state, self._validate, self._loss = koi, state, validate, loss
        self._every, self._keep_best, self._patience = every, keep_best, patience
        self._folder = folder

    def in_words(self) -> dict[str, str]:
        """Return what must be the same on all ranks."""
        numbers = {"validate_every": self._every, "keep_best": self._keep_best}
        measures = {"validate": self._validate is not None, "patience": self._patience}
        return {name: str(value) for name, value in (numbers | measures).items()}

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        best = self._state.best
        return self._patience is not None and best is not None and best.misses >= self._patience

    @property
    def due(self) -> bool:
        """Whether φ is to be measured after the last meta-iteration."""
        if self._validate is None:
            return False
        done = self._state.iteration
        return done % self._every == 0 or done == self._koi.settings.num_iterations

    def after(self, ranks: Ranks) -> None:
        """Measure φ, and put what came of it into the last record."""
        state = self._state
        owed, best = state.owed, state.best
        assert owed is not None
        with ranks.agreed():
            # by rank 0 alone, since others may round otherwise and would not stop where it does
            value = self._measure() if ranks.first else math.nan
        value = ranks.value_of_first(value)
        with uninterrupted():
            state.history.validated(value)
            state.owed = replace(owed, validated=True)
            try:
                self._take(value, ranks.first)
            except CheckpointError:  # then it is measured again
                state.history.validated(None)
                state.owed, state.best = owed, best
                raise

    def finish(self) -> None:
        """Let φ be the best that was measured."""
        koi, state, best = self._koi, self._state, self._state.best
        if self._validate is None or not self._keep_best or best is None:
            return
        if best.phi is None or best.iteration == state.iteration:
            return
        learned = koi.settings.learned(koi.model)
        with uninterrupted():
            copy_(self._phi(), best.phi)
            # those of another inner_optimizer are of no use to this one
            same = same_shapes(best.moments or [], state.carried(koi.settings) or [])
            moments = best.moments if same else None
            state.keep(moments, learned.params_of(koi.model), koi.settings)
        log.info(
            "φ is that after %d of %d meta-iterations, where validation gave %.4g",
            *(best.iteration, state.iteration, best.value),
        )

    def _take(self, value: float, saves: bool) -> None:
        """Count a measurement, and keep φ where it is the best so far; NaN is never."""
        koi, state = self._koi, self._state
        if not value < (math.inf if state.best is None else state.best.value):
            if state.best is not None:
                state.best = replace(state.best, misses=state.best.misses + 1)
            return
        state.best = Best(state.iteration, value)
        if not self._keep_best:
            return
        phi = clone(self._phi())
        moments = state.carried(koi.settings)
        state.best = replace(state.best, phi=phi, moments=moments and clone(moments))
        if saves and self._folder is not None:
            checkpoint.save(koi, state, self._folder.best, self._folder.past)

    def _phi(self) -> Tensors:
        """Return all tensors that are φ's, not copies."""
        settings, model = self._koi.settings, self._koi.model
        names = settings.learned(model)
        rates = self._state.rates(names.params_of(model), names, settings)
        return [*(t.detach() for t in names.tensors_of(model)), *rates]

    def _measure(self) -> float:
        if hasattr(self._validate, "sample"):
            return self._loss(self._validate)
        value = self._validate(self._koi)
        try:
            return float(value)
        except (TypeError, ValueError):
            wanted = "it must return a number, the smaller the better"
            raise ConfigurationError([f"validate returned {value!r}: {wanted}"]) from None
