"""Where a training starts: from a checkpoint, from what was loaded, or from what the learner is.

All of it happens before the first draw, once, and on every rank the same: `begin` puts tasks,
callbacks and learner into the state that the training goes on from; `let_go` hands it over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from koi import randomness, storage
from koi.configured import Configured
from koi.errors import CheckpointError
from koi.phi import arithmetic
from koi.ranks.grid import Grid
from koi.ranks.group import Ranks
from koi.training import checkpoint, sharded, stateful
from koi.training.folder import Folder
from koi.training.sharded import ShardedFolder
from koi.training.state import TrainingState
from koi.training.watch import warn

log = logging.getLogger("koi")


def begin(
    koi: Configured,
    state: TrainingState,
    tasks: Any,
    callbacks: Iterable[Any],
    folder: Folder | None,
    resume: bool,
    ranks: Ranks,
) -> None:
    """Put everything into the state that the training goes on from, that of rank 0.

    Args:
        koi: the learner.
        state: what it has come to.
        tasks: the task distribution.
        callbacks: those of the training, of which some may have a state.
        folder: of the checkpoints, which rank 0 alone looks at; None: there is none.
        resume: go on from the newest good checkpoint there.
        ranks: the processes that train together.

    Raises:
        ConfigurationError: a callback's state cannot be given back.
        CheckpointError: the folder cannot be used, or what is in it does not fit.
    """
    owners = stateful.holders(callbacks)
    state.tasks, state.begun = tasks, None
    with ranks.agreed():
        if isinstance(folder, ShardedFolder):
            folder.attach(ranks)
        if ranks.first or ranks.shards is not None:
            resumed = folder is not None and _resumed(koi, state, tasks, owners, folder, resume)
            if state.pending is not None and not resumed:
                stateful.give_states(owners, state.pending.callbacks)
                stateful.give_state(tasks, state.pending.mark.tasks)
    if ranks.size > 1 and ranks.grid is not None:
        _become_the_first_group(koi, state, tasks, owners, ranks, ranks.grid)
    elif ranks.size > 1:
        _become_the_first(koi, state, tasks, owners, ranks)
    state.callbacks = owners
    thread = threading.current_thread()
    if thread is not threading.main_thread() and state.seed(koi.settings) is not None:
        log.warning(
            "a training with a seed in the thread %s: what other threads draw meanwhile from the "
            "global generators of Python, NumPy or torch changes it; let them draw from "
            "generators of their own (another Koi waits its turn)",
            thread.name,
        )


def let_go(state: TrainingState, saves: bool) -> None:
    """Hand over what was loaded: from here on the state is what training makes of it.

    Raises:
        CheckpointError: checkpoints are wanted, and a file cannot hold the callbacks' states.
    """
    if saves:  # now that a scheduler has its optimizer, and not in an hour
        storage.encode([owner.state_dict() for owner in state.callbacks], "callbacks", {})
        _look_for_a_scheduler(state)
    pending, state.pending = state.pending, None
    if pending is not None and pending.mark.generators is not None:
        with randomness.alone():
            randomness.restore(pending.mark.generators)


def _resumed(
    koi: Configured,
    state: TrainingState,
    tasks: Any,
    owners: tuple[Any, ...],
    folder: Folder,
    wanted: bool,
) -> bool:
    """Go on from the newest good file, if one is wanted and ahead of the learner."""
    # better now than after an hour
    storage.encode(state.mark(koi.settings).tasks, "tasks", {})
    folder.prepare()
    if not wanted:
        folder.check_unused(state.iteration)
        return False
    saved = folder.newest_good(koi, state.iteration)
    if saved is not None:
        checkpoint.go_on(koi, state, saved, tasks, owners)
    return saved is not None


def _become_the_first(
    koi: Configured, state: TrainingState, tasks: Any, owners: tuple[Any, ...], ranks: Ranks
) -> None:
    """Let every rank be in the state of rank 0, and draw from the same seed."""
    content = b""
    frozen = koi.settings.learned(koi.model).others_of(koi.model)
    with ranks.agreed():
        if ranks.first:
            state.draw_seed(koi.settings)
            callbacks = None if state.pending is None else state.pending.callbacks
            of_ranks = {"frozen": {}, "frozen_values": frozen, "callbacks": callbacks}
            content = storage.pack(checkpoint.contents(koi, state) | of_ranks)
    content = ranks.from_first(content)
    with ranks.agreed():
        if not ranks.first:
            data = storage.unpack(content, "of rank 0")
            if not owners:  # as where only rank 0 has a logger
                data["callbacks"] = None
            saved = checkpoint.saved_from(data, "of rank 0")
            checkpoint.go_on(koi, state, saved, tasks, owners)
            arithmetic.copy_(list(frozen.values()), [data["frozen_values"][n] for n in frozen])


def _become_the_first_group(
    koi: Configured,
    state: TrainingState,
    tasks: Any,
    owners: tuple[Any, ...],
    ranks: Ranks,
    grid: Grid,
) -> None:
    """Let every task group have the φ of the first one, and all ranks the rest of rank 0's state.

    Raises:
        CheckpointError: what is sharded differs in form.
    """
    if ranks.first:
        state.draw_seed(koi.settings)
    callbacks = None if state.pending is None else state.pending.callbacks
    own = checkpoint.contents(koi, state) | {"callbacks": callbacks}
    rest, pairs = sharded.taken_out(koi, own)
    content = ranks.from_first(storage.pack(rest))
    parts = [tensor for tensor, _ in pairs]
    with ranks.agreed():
        forms = [(tensor.dtype, number) for tensor, number in pairs]
        data, marks = storage.unpack(content, "of rank 0"), []
        sharded.mapped(koi, data, lambda mark, _number: marks.append(mark))
        if [(str(dtype), i) for dtype, i in forms] != [(f"torch.{m[1]}", m[2]) for m in marks]:
            raise CheckpointError(
                "φ, moments or the meta-optimizer's state differ in form between ranks: let all "
                "begin with a learner of the same settings and the same past"
            )
    grid.from_first_group(parts)
    with ranks.agreed():
        if not ranks.first:
            if not owners:
                data["callbacks"] = None
            whole = sharded.put_in(koi, data, parts)
            checkpoint.go_on(koi, state, checkpoint.saved_from(whole, "of rank 0"), tasks, owners)


def _look_for_a_scheduler(state: TrainingState) -> None:
    update = state.update
    groups = [] if update is None or update.optimizer is None else update.optimizer.param_groups
    # what every scheduler of torch leaves there
    if not state.callbacks and any("initial_lr" in group for group in groups):
        warn(
            "meta_optimizer has a scheduler, and no checkpoint will hold how far it is: let a "
            "callback step it that has state_dict and load_state_dict"
        )
