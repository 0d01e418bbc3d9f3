"""Checkpoints that a training writes of itself."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from koi.configured import Configured
from koi.errors import CheckpointError, annotate
from koi.ranks.group import Ranks
from koi.training.folder import Folder
from koi.training.interrupts import Termination, uninterrupted
from koi.training.state import TrainingState


class Autosave:
    """Saves a training every so often, at its end, and where it is stopped.

    What a stopped training saves is its state after the last completed meta-iteration, so that
    going on from there gives what going on without a stop would have given. Of several ranks the
    first saves; where φ is sharded, all of them do, if all have come to the same end.

    Args:
        koi: the learner.
        state: what it has come to.
        folder: where to save; None: nowhere.
        every: meta-iterations from one file to the next; None: only at the end.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        koi: Configured,
        state: TrainingState,
        folder: Folder | None,
        every: int | None,
        ranks: Ranks,
    ) -> None:
        self._koi = koi
        self._state = state
        self._folder = folder if ranks.first or ranks.shards is not None else None
        self._every = every
        self._holds_sigterm = folder is not None
        self._ranks = ranks
        self._termination = Termination()
        ranks.wants_to_stop = lambda: self._termination.requested

    def __enter__(self) -> Autosave:
        if self._holds_sigterm:
            self._termination.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._save()
            elif (
                self._state.iteration > 0
                and not isinstance(error, CheckpointError)
                and (self._ranks.shards is None or self._ranks.all_have_stopped)
            ):
                self._save_stopped(error)
        finally:
            self._termination.__exit__(kind, error, trace)

    def before_iteration(self) -> None:
        """Remember where the meta-iteration draws from, should it not be completed."""
        if self._folder is not None:
            self._state.remember(self._koi.settings)

    @property
    def saves(self) -> bool:
        """Whether this process saves."""
        return self._folder is not None

    @property
    def first_line(self) -> Path | None:
        """Where the log's first line is kept until there is a checkpoint, which tells it then."""
        return None if self._folder is None else self._folder.first_line

    @property
    def due(self) -> bool:
        """Whether it is time to save, or SIGTERM asks for an end."""
        regular = self._every is not None and self._state.iteration % self._every == 0
        return regular or self._ranks.stopping

    def after_iteration(self) -> None:
        """Save where that is due, and let a SIGTERM do what it does."""
        if self.due:
            self._save()
            if self._ranks.stopping:  # as all have agreed
                self._termination.request()
                self._termination.let_through()

    def _save(self) -> None:
        """Write the file of this iteration, unless it is there, and remove what is too old."""
        folder, number = self._folder, self._state.iteration
        if folder is None:
            return
        is_there = number == folder.newest and self._state.owed == folder.owed
        if self._ranks.shards is not None:  # what is owed may differ
            is_there = self._ranks.value_of_first(is_there)
        if is_there:
            return
        with uninterrupted():
            folder.save(self._koi, self._state, number)
            folder.newest, folder.owed = number, self._state.owed
            folder.remove_old()

    def _save_stopped(self, error: BaseException) -> None:
        try:
            self._save()
        except CheckpointError as second:
            annotate(error, str(second))
