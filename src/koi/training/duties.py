"""What follows each meta-iteration: validation, then the callbacks, in the order they were given.

A training that is stopped in their midst owes the rest. The next one, in this process or from a
checkpoint, does it before all else: first that which was stopped, again from its beginning, and
what it had changed of the training by then is put back.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from koi.configured import Configured
from koi.errors import annotate
from koi.ranks.group import Ranks
from koi.records import STOP, Record
from koi.training import stateful
from koi.training.interrupts import uninterrupted
from koi.training.progress import ProgressBar
from koi.training.state import Owed, TrainingState
from koi.training.validation import Validation

log = logging.getLogger("koi")


class Duties:
    """Does what follows each meta-iteration, and keeps count of it in ``state.owed``.

    Args:
        koi: the learner.
        state: what it has come to.
        validation: measures φ where that is due.
        callbacks: each is called as ``callback(koi, record)``.
        ranks: the processes that train together; what rank 0 owes is owed on all.
    """

    def __init__(
        self,
        koi: Configured,
        state: TrainingState,
        validation: Validation,
        callbacks: Sequence[Callable[..., Any]],
        ranks: Ranks,
    ) -> None:
        self._koi, self._state, self._ranks = koi, state, ranks
        self._validation, self._callbacks = validation, callbacks

    def new(self) -> Owed:
        """Return what a meta-iteration owes when φ has moved: everything."""
        return Owed(num_callbacks=len(self._callbacks))

    def catch_up(self, bar: ProgressBar) -> None:
        """Do what an earlier training was stopped in."""
        if self._state.owed is None:
            return
        owed = self._state.owed = self._state.owed.in_a_file()
        here = len(self._callbacks)
        if here not in (0, owed.num_callbacks):
            log.warning(
                "the training was stopped in callback %d of %d and goes on with %d: of the last "
                "record those from that place on are called",
                *(owed.next_callback + 1, owed.num_callbacks, here),
            )
        self._ranks.wants_to_end |= owed.ends
        self.do(bar)

    def do(self, bar: ProgressBar) -> None:
        """Do what the last record is owed."""
        state = self._state
        assert state.owed is not None
        if not state.owed.validated and self._validation.due:
            with undone_if_stopped(self._koi, state, None):
                self._validation.after(self._ranks)
        elif self._callbacks:  # which may be stopped
            state.owed = replace(state.owed, validated=True)
        record = state.history[-1]
        bar.advance(record)
        for number in range(state.owed.next_callback, len(self._callbacks)):
            self._call(number, record)
        state.owed = None

    def _call(self, number: int, record: Record) -> None:
        callback, state, ranks = self._callbacks[number], self._state, self._ranks
        owed = state.owed
        assert owed is not None
        with undone_if_stopped(self._koi, state, stateful.owner_of(callback)):
            state.owed = replace(owed, calling=True)
            ranks.wants_to_end |= callback(self._koi, record) is STOP
            state.owed = replace(owed, next_callback=number + 1, ends=ranks.wants_to_end)


@contextmanager
def undone_if_stopped(koi: Configured, state: TrainingState, owner: Any) -> Iterator[None]:
    """Put back what the block has changed where an error or an interrupt keeps it from its end.

    That is what a checkpoint holds and what is small: the state of ``owner``, of the tasks and,
    without a seed, of the global generators; the settings; the meta-optimizer's rates. The block is
    at its end when less is owed than before.
    """
    owed, settings, mark = state.owed, koi.settings, state.mark(koi.settings)
    own = None if owner is None else copy.deepcopy(owner.state_dict())
    optimizer = None if state.update is None else state.update.optimizer
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups]
    try:
        yield
    except BaseException as error:
        if state.owed == owed:
            state.owed = owed
            with uninterrupted():
                koi.settings = settings
                for group, before in zip(groups, rates, strict=False):
                    group.update(before)
                try:
                    state.go_back_to(mark)
                    if owner is not None:
                        owner.load_state_dict(own)
                except Exception as second:
                    annotate(error, f"what was changed by then could not be put back: {second}")
        raise
