"""Checkpoints that a training writes of itself and goes on from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from koi import files, randomness, storage
from koi.configuration import check_count
from koi.errors import CheckpointError, ConfigurationError, annotate
from koi.phi import parameters
from koi.ranks.group import Ranks
from koi.training import checkpoint, stateful
from koi.training.checkpoint import Learner, Mark
from koi.training.interrupts import Termination
from koi.training.watch import warn

_NAME = re.compile(r"iteration-(\d+)\.safetensors")
_KEPT = 2
_BEGUN = "begun.jsonl"
_BEGINNINGS = ".iteration-", f".{_BEGUN}."  # of files that were never completed


class Autosave:
    """Saves a training every so often, at its end, and where it is stopped.

    Files are named by how many meta-iterations they have behind them; the last two are kept. What
    a stopped training saves is its state after the last completed meta-iteration, so that going on
    from there gives what going on without a stop would have given.

    Of several ranks the first reads and writes. The others begin as what it is, in all that
    training needs to go on.

    Args:
        koi: the learner.
        tasks: the task distribution.
        folder: where to save, made if it is missing; None: nowhere.
        every: meta-iterations from one file to the next; None: only at the end.
        resume: go on from the newest good file in ``folder``.
        ranks: the processes that train together.
        callbacks: those of the training, of which some may have a state.

    Raises:
        ConfigurationError: arguments that make no sense together, or a callback's state that
            cannot be given back.
        CheckpointError: the folder cannot be used, or what is in it does not fit.
    """

    def __init__(
        self,
        koi: Learner,
        tasks: Any,
        folder: Any,
        every: int | None,
        resume: bool,
        ranks: Ranks,
        callbacks: Iterable[Any],
    ) -> None:
        if folder is None and (every is not None or resume):
            name = "resume" if resume else "checkpoint_every"
            raise ConfigurationError([f"{name} was given without checkpoint_dir: give both"])
        if every is not None:
            check_count("checkpoint_every", every)
        self._koi = koi
        self._every = every
        self._folder = Path(folder) if folder is not None and ranks.first else None
        self._holds_sigterm = folder is not None
        self._ranks = ranks
        self._termination = Termination()
        ranks.wants_to_stop = lambda: self._termination.requested
        self._mark: tuple[int, Mark] | None = None
        self._saved_at: int | None = None
        self._damaged: set[int] = set()
        self._stateful = stateful.holders(callbacks)
        koi._tasks = tasks
        with ranks.agreed():
            if self._folder is not None:
                # better now than after an hour
                storage.encode(checkpoint.mark(koi).tasks, "tasks", {})
                self._prepare(self._folder)
                self._resume(self._folder, tasks, resume)
            if ranks.first and koi._pending is not None and self._saved_at is None:
                stateful.give_states(self._stateful, koi._pending.callbacks)
                stateful.give_state(tasks, koi._pending.mark.tasks)
        if ranks.size > 1:
            self._become_the_first(tasks)

    @property
    def ruled_out(self) -> frozenset[str]:
        """The forms of the inner loop that the training that goes on had ruled out."""
        return frozenset() if self._koi._pending is None else self._koi._pending.ruled_out

    @property
    def begun(self) -> Path | None:
        """Where the log's first line is kept until there is a checkpoint, which tells it then."""
        return None if self._folder is None or self._saved_at is not None else self._folder / _BEGUN

    def __enter__(self) -> Autosave:
        self._koi._callbacks = self._stateful
        if self._folder is not None:  # now that a scheduler has its optimizer, and not in an hour
            storage.encode([owner.state_dict() for owner in self._stateful], "callbacks", {})
            self._look_for_a_scheduler()
        pending, self._koi._pending = self._koi._pending, None
        if pending is not None and pending.mark.generators is not None:
            randomness.restore(pending.mark.generators)
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
            elif self._koi.iteration > 0 and not isinstance(error, CheckpointError):
                self._save_stopped(error)
        finally:
            self._termination.__exit__(kind, error, trace)

    def before_iteration(self) -> None:
        """Remember where the meta-iteration draws from, should it not be completed."""
        if self._folder is not None:
            self._mark = self._koi.iteration, checkpoint.mark(self._koi)

    @property
    def due(self) -> bool:
        """Whether it is time to save, or SIGTERM asks for an end."""
        regular = self._every is not None and self._koi.iteration % self._every == 0
        return regular or self._ranks.stopping

    def after_iteration(self) -> None:
        """Save where that is due, and let a SIGTERM do what it does."""
        if self.due:
            self._save()
            if self._ranks.stopping:
                self._termination.request()
            self._termination.let_through()

    def _save(self) -> None:
        """Write the file of this iteration, unless it is there, and remove what is too old."""
        number = self._koi.iteration
        if self._folder is None or number == self._saved_at:
            return
        begun = self._mark is not None and self._mark[0] == number
        at = self._mark[1] if self._mark is not None and begun else None
        with self._koi._interrupts.held():
            checkpoint.save(self._koi, _path(self._folder, number), at)
            self._saved_at = number
            self._remove_old(self._folder, number)

    def _save_stopped(self, error: BaseException) -> None:
        try:
            self._save()
        except CheckpointError as second:
            annotate(error, str(second))

    def _remove_old(self, folder: Path, newest: int) -> None:
        good = [n for n in _numbers(folder) if n <= newest and n not in self._damaged - {newest}]
        kept = {_path(folder, n).name for n in good[-_KEPT:]}
        with contextlib.suppress(OSError):
            for path in list(folder.iterdir()):
                begun = path.suffix == ".tmp" and path.name.startswith(_BEGINNINGS)
                old = _NAME.fullmatch(path.name) and path.name not in kept
                if begun or old or path.name == _BEGUN:
                    path.unlink()

    def _prepare(self, folder: Path) -> None:
        """Make the folder and try to write there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trial = files.temporary_name(_path(folder, 0))
            trial.write_bytes(b"")
            trial.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir {folder} cannot be written to ({error.strerror or error}): "
                "choose another folder"
            ) from error

    def _resume(self, folder: Path, tasks: Any, wanted: bool) -> None:
        """Go on from the newest good file, if one is ahead of the learner."""
        koi = self._koi
        ahead = [n for n in _numbers(folder) if n >= koi.iteration]
        if not wanted and ahead and (koi.iteration == 0 or ahead[-1] > koi.iteration):
            raise CheckpointError(
                f"checkpoint_dir {folder} holds an earlier training, up to meta-iteration "
                f"{ahead[-1]}: give resume=True to go on with it, or another folder"
            )
        if not wanted:
            return
        for number in reversed(ahead):
            path = _path(folder, number)
            try:
                saved = checkpoint.read(path)
            except CheckpointError as error:
                self._damaged.add(number)
                warn(f"{error}; looking for one")
                continue
            checkpoint.go_on(koi, saved, tasks, self._stateful)
            self._saved_at = number
            return
        if ahead and koi.iteration == 0:
            raise CheckpointError(
                f"none of the {len(ahead)} checkpoints in {folder} can be used: to train from the "
                "beginning, choose another folder or empty this one"
            )

    def _look_for_a_scheduler(self) -> None:
        update = self._koi._update
        groups = [] if update is None or update.optimizer is None else update.optimizer.param_groups
        # what every scheduler of torch leaves there
        if not self._stateful and any("initial_lr" in group for group in groups):
            warn(
                "meta_optimizer has a scheduler, and no checkpoint will hold how far it is: let a "
                "callback step it that has state_dict and load_state_dict"
            )

    def _become_the_first(self, tasks: Any) -> None:
        """Let every rank be in the state of rank 0, and draw from the same seed."""
        koi, ranks, content = self._koi, self._ranks, b""
        frozen = {n: p for n, p in koi.model.named_parameters() if not p.requires_grad}
        with ranks.agreed():
            if ranks.first:
                if koi.seed is None and koi._drawn_seed is None:
                    koi._drawn_seed = int(torch.randint(2**62, ()))
                state = checkpoint.contents(koi, checkpoint.mark(koi))
                callbacks = None if koi._pending is None else koi._pending.callbacks
                state |= {"frozen": {}, "frozen_values": frozen, "callbacks": callbacks}
                content = storage.pack(state)
        content = ranks.from_first(content)
        with ranks.agreed():
            if not ranks.first:
                data = storage.unpack(content, "of rank 0")
                if not self._stateful:  # as where only rank 0 has a logger
                    data["callbacks"] = None
                saved = checkpoint.saved_from(data, "of rank 0")
                checkpoint.go_on(koi, saved, tasks, self._stateful)
                parameters.copy_(list(frozen.values()), [data["frozen_values"][n] for n in frozen])


def _path(folder: Path, number: int) -> Path:
    return folder / f"iteration-{number:09d}.safetensors"


def _numbers(folder: Path) -> list[int]:
    """Return the meta-iterations of which the folder has files, in order."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)
