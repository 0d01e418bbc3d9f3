"""The learner: Reptile, FOMAML and MAML on any module and any tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import nn

from koi.adapting import Adapting
from koi.configured import documented, takes
from koi.engines import Engines, Ready
from koi.errors import ConfigurationError
from koi.phi.outcome import Outcome
from koi.phi.schedules import value_at
from koi.phi.shards import in_words
from koi.phi.update import MetaUpdate, Moved
from koi.randomness import Place, alone, preserved_generators
from koi.ranks.group import Ranks
from koi.records import STOP, History, Record, mean_ends
from koi.sampling import check_tasks, weighted
from koi.settings import Settings, check_count
from koi.training import start
from koi.training.arguments import check_options, checked_callbacks
from koi.training.autosave import Autosave
from koi.training.draws import Draws
from koi.training.duties import Duties
from koi.training.folder import Folder
from koi.training.interrupts import Interrupts
from koi.training.logs import Log
from koi.training.progress import ProgressBar
from koi.training.sharded import ShardedFolder
from koi.training.state import Best, Owed, TrainingState
from koi.training.stepping import Stepping
from koi.training.validation import Validation
from koi.training.watch import Watch

Callback = Callable[["Koi", Record], Any]


@documented(Settings)
class Koi(Adapting):
    """Finds an initialisation φ of ``model`` from which a few steps learn a new task.

    Each meta-iteration samples meta_batch_size tasks, takes num_steps optimizer steps on each
    task's loss from φ, which gives φ̃_1 … φ̃_n, and moves φ by the meta-update
    φ ← φ + ε · mean(φ̃_i − φ) (Reptile; Nichol, Achiam, Schulman, arXiv 1803.02999, algorithm 2).

    φ is the weights of ``model`` itself: they change once a meta-iteration, wholly or not at all.
    All inner steps are taken on a copy.

    Args:
        model: any module; its current weights are the first φ.
        settings: those of `koi.settings.Settings`, each by its name.

    Raises:
        ConfigurationError: arguments that cannot work, all named at once.
        ModelError: the model has nothing to learn, or cannot be copied.

    >>> import torch
    >>> class Task:
    ...     def loss(self, model):
    ...         return (model(torch.ones(1, 1)) - 3).square().mean()
    >>> class Tasks:
    ...     def sample(self):
    ...         return Task()
    >>> model = torch.nn.Linear(1, 1)
    >>> koi = Koi(model, step_size=0.1, num_steps=5, num_iterations=20, meta_step_size=0.5)
    >>> koi.train(Tasks()) is model
    True
    >>> abs(model(torch.ones(1, 1)).item() - 3) < 1e-3
    True
    """

    STOP = STOP

    @takes(Settings)
    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.model = model
        self._state = TrainingState()
        self._interrupts = Interrupts()
        self._engines = Engines()
        self._stepping = Stepping()
        # so that a mistake shows here, not after the first sampling
        ready = self._ready()
        if settings.meta_optimizer is not None:
            self._meta_update(ready)

    @property
    def iteration(self) -> int:
        """Meta-iterations done."""
        return self._state.iteration

    @property
    def history(self) -> History:
        """What is remembered of each of them, read like a list."""
        return self._state.history

    @property
    def best(self) -> Best | None:
        """What validation has found: ``best.iteration`` meta-iterations had ``best.value``."""
        return self._state.best

    @property
    def engine(self) -> str:
        """What ran last: "eager", "vectorized", "compiled", or "vectorized+compiled"."""
        return self._state.engine

    def train(
        self,
        tasks: Any,
        progress: bool | None = None,
        callbacks: Callback | Iterable[Callback] | None = (),
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        validate: Any = None,
        validate_every: int = 500,
        keep_best: bool = True,
        patience: int | None = None,
        workers: int = 0,
    ) -> nn.Module:
        """Run the meta-iterations that are left and return the model, its weights at φ.

        An exception, an interrupt or a loss that is not finite leaves φ at the last completed
        meta-iteration; calling ``train`` again goes on from there.

        Args:
            tasks: a task distribution, anything with ``sample() -> task``; a task is anything
                with ``loss(model) -> scalar tensor``.
            progress: whether to show a progress bar; None: where there is a terminal.
            callbacks: one or several; each is called as ``callback(koi, record)`` after each
                meta-iteration. One that returns ``koi.STOP`` ends the training there (on several
                ranks one later), as if no iterations were left. Those with ``state_dict`` and
                ``load_state_dict`` go on from a checkpoint as they were. One that is stopped is
                called again, and those after it are, as the next training begins.
            checkpoint_dir: a folder for checkpoints, of which the last two are kept. The training
                is saved at its end, and where an error, Ctrl-C or SIGTERM stops it.
            checkpoint_every: meta-iterations from one checkpoint to the next as well.
            resume: go on from the newest good checkpoint in the folder, if there is one: what
                comes out is then, bit for bit, what a training that never stopped gives.
            log_dir: a folder for metrics.jsonl, which holds ``koi.history``, a line of JSON for
                each meta-iteration, and for TensorBoard's curves where that is installed.
            validate: a task distribution, of which the mean query loss after adaptation to 100
                tasks, always the same, is put into the record; or a callable of the learner that
                returns a number, the smaller the better.
            validate_every: meta-iterations from one validation to the next; the last has one, too.
            keep_best: whether φ is at the end that of the best validation (`best` says which), and
                is kept as best.safetensors in checkpoint_dir. Checkpoints go on from the last φ.
            patience: validations in a row without a new best, after which training ends.
            workers: processes that draw the tasks of the next meta-iterations meanwhile (each
                rank's own, with torch's DataLoader): the same tasks as without. 0: none.

        Raises:
            ConfigurationError: ``tasks`` cannot be sampled from, a schedule gave no number,
                log_dir cannot be used, or workers would draw other tasks.
            CheckpointError: a checkpoint cannot be written, or does not fit model or settings;
                another training uses the folder, or this learner.
            TaskError: a loss that is no scalar or does not depend on the model, or a dead worker.
            NonFiniteError: a loss that is NaN or infinite (with ``on_nonfinite="raise"``).
        """
        check_tasks(tasks)
        check_options(progress, checkpoint_dir, resume, log_dir)
        callbacks = checked_callbacks(callbacks)
        check_count("workers", workers, least=0, most=1000)
        kind = Folder if self.settings.learned(self.model).shards is None else ShardedFolder
        folder = kind.given(checkpoint_dir, checkpoint_every, resume)
        validation = Validation(
            *(self, self._state, validate, self._validation_loss),
            *(validate_every, keep_best, patience, folder),
        )
        with self._state.training("koi.train"), folder or nullcontext():
            arguments = tasks, callbacks, validation, progress
            return self._train(*arguments, folder, checkpoint_every, resume, log_dir, workers)

    def _train(
        self,
        tasks: Any,
        callbacks: tuple[Callback, ...],
        validation: Validation,
        progress: bool | None,
        folder: Folder | None,
        checkpoint_every: int | None,
        resume: bool,
        log_dir: str | os.PathLike[str] | None,
        workers: int,
    ) -> nn.Module:
        state, total = self._state, self.settings.num_iterations
        ranks, ready, watch, draws = self._begin(
            tasks, callbacks, folder, resume, workers, validation
        )
        update = self._meta_update(ready)
        bar = ProgressBar(progress if ranks.first else False, total, state.iteration)
        duties = Duties(self, state, validation, callbacks, ranks)
        saver = Autosave(self, state, folder, checkpoint_every, ranks)
        with ranks.agreed():
            logged = log_dir if ranks.first else None
            log = Log(logged, state, total, resume, saver.first_line)
        with bar, self._interrupts, ranks.training(update.phi), saver, log, draws:
            with ranks.in_step():
                start.let_go(state, saves=saver.saves)
                duties.catch_up(bar)
            while state.iteration < self.settings.num_iterations:
                if ranks.ending or validation.exhausted:
                    break
                with ranks.in_step():
                    saver.before_iteration()
                    with alone():
                        ready = self._ready(ready)  # a callback may have changed anything
                        self._meta_iteration(draws, ready, watch, ranks, duties.new())
                    duties.do(bar)
                log.after_iteration(saver.due)
                saver.after_iteration()
        validation.finish()
        return self.model

    def step(self, tasks: Any) -> Record:
        """Do the next meta-iteration, for a loop of one's own, and return its record.

        The numbers are those of `train`, bit for bit; an error leaves φ as it was before.

        Args:
            tasks: a task distribution.

        Raises:
            ConfigurationError, TaskError, NonFiniteError: as in `train`, or all num_iterations are
                done.
            CheckpointError: a training runs, of which this would be a part.

        >>> import torch
        >>> from koi.problems import Lines
        >>> koi = Koi(torch.nn.Linear(1, 1), step_size=0.02, num_iterations=3)
        >>> [koi.step(Lines()).iteration for _ in range(3)]
        [0, 1, 2]
        """
        check_tasks(tasks)
        with self._state.training("koi.step"):
            return self._step(tasks)

    def _step(self, tasks: Any) -> Record:
        state = self._state
        if state.iteration >= self.settings.num_iterations:
            raise ConfigurationError(
                [
                    f"all num_iterations = {self.settings.num_iterations} are done, over which "
                    "schedules run: make koi.num_iterations larger for more"
                ]
            )
        kept = self._stepping
        if kept.tasks is not tasks or state.pending is not None:
            kept.ranks, kept.ready, kept.watch, kept.draws = self._begin(tasks, (), None, False)
            start.let_go(state, saves=False)
            kept.tasks = tasks
        with self._interrupts, alone():
            kept.ready = self._ready(kept.ready)
            return self._meta_iteration(kept.draws, kept.ready, kept.watch, kept.ranks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at φ."""
        return self.model(*args, **kwargs)

    def _meta_iteration(
        self, draws: Draws, ready: Ready, watch: Watch, ranks: Ranks, owed: Owed | None = None
    ) -> Record:
        began = time.perf_counter()
        settings, state, engine = self.settings, self._state, ready.engines
        seed, carry = state.seed(settings), settings.inner_state == "carry"
        update = self._meta_update(ready)
        ranks.adjust(update.phi, settings.meta_batch_size, carry)
        place = Place(seed, "meta-iteration", state.iteration)
        epsilon = value_at(settings.schedule, state.iteration / settings.num_iterations)

        def adapt(start: int, end: int) -> Outcome:
            batch = draws.take(settings.meta_batch_size, place, (start, end))
            batch = weighted(batch, place)
            return engine.meta_batch(update.phi, batch, settings.num_steps, place)

        with preserved_generators(seed):
            own = ranks.attempt(adapt)
        state.engine, state.ruled_out = engine.name, engine.refused
        with self._interrupts.held():
            outcome = ranks.mean(own)
            outcome.check_weight(place)
            moved = Moved(0.0, 0.0)
            if outcome.weight > 0:
                moved = update.apply(outcome, epsilon, settings.clip_meta)
                state.keep_after(update.phi, outcome.moments if carry else None, settings)
            losses = mean_ends(outcome.losses, outcome.weights)
            seconds = time.perf_counter() - began
            record = Record(
                *(state.iteration, *losses, epsilon, moved.update, seconds),
                num_skipped=outcome.num_skipped,
                meta_gradient_norm=moved.gradient,
            )
            state.history.append(record)
            state.iteration += 1
            state.owed = owed
        watch.look(outcome, epsilon, moved.update, settings.num_steps)
        return record

    def _begin(
        self,
        tasks: Any,
        callbacks: tuple[Callback, ...],
        folder: Folder | None,
        resume: bool,
        workers: int = 0,
        validation: Validation | None = None,
    ) -> tuple[Ranks, Ready, Watch, Draws]:
        """Put everything into the state that meta-iterations go on from, on all ranks."""
        settings, ready = self.settings, self._ready()
        device, carry = self._phi(ready, settings).params[0].device, settings.inner_state == "carry"
        shards = ready.inner.learned.shards
        alike = settings.in_words() | ({} if validation is None else validation.in_words())
        alike |= in_words(self.model) | ({} if folder is None else folder.in_words())
        ranks = Ranks(device, settings.meta_batch_size, carry, self._interrupts, alike, shards)
        start.begin(self, self._state, tasks, callbacks, folder, resume, ranks)
        if self._state.pending is not None:
            ready.engines.refused |= self._state.ruled_out
        watch = Watch(ready.inner.algorithm, settings.num_steps, silent=not ranks.first)
        if workers:
            self._state.draw_seed(settings)
        place = Place(self._state.seed(settings), "meta-iteration", self._state.iteration)
        with ranks.agreed():
            draws = Draws(self, tasks, ranks.share, place, workers)
        return ranks, ready, watch, draws

    def _meta_update(self, ready: Ready) -> MetaUpdate:
        return self._state.meta_update(
            self._phi(ready, self.settings), ready.inner.algorithm, self.settings
        )
