"""The learner: Reptile, FOMAML and MAML on any module and any tasks."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koi.configured import Configured, documented, takes
from koi.engines import Engines, Ready, check_surroundings
from koi.evaluation import Evaluation, blocks, stacked
from koi.inner.base import Metric, finite_rows
from koi.inner.eager import EagerEngine
from koi.inner.scaling import LossScale
from koi.phi.arithmetic import Tensors, same_tensors
from koi.phi.outcome import Outcome, Phi
from koi.phi.schedules import value_at
from koi.phi.update import MetaUpdate
from koi.randomness import Place, preserved_generators
from koi.ranks.group import Ranks
from koi.records import Record, mean_ends
from koi.sampling import check_tasks, draw
from koi.settings import Settings, check_count
from koi.training import checkpoint, start
from koi.training.autosave import Autosave
from koi.training.folder import Folder
from koi.training.interrupts import Interrupts
from koi.training.logs import Log
from koi.training.progress import ProgressBar
from koi.training.state import TrainingState
from koi.training.watch import Watch

log = logging.getLogger("koi")
Callback = Callable[["Koi", Record], None]


@documented(Settings)
class Koi(Configured):
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

    @takes(Settings)
    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.model = model
        self._state = TrainingState()
        self._interrupts = Interrupts()
        self._engines = Engines()
        self._find_engines()  # so that a mistake shows here, not after the first sampling

    @property
    def iteration(self) -> int:
        """Meta-iterations done."""
        return self._state.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._state.iteration = value

    @property
    def history(self) -> list[Record]:
        """What is remembered of each of them."""
        return self._state.history

    @property
    def engine(self) -> str:
        """What ran last: "eager", "vectorized", "compiled", or "vectorized+compiled"."""
        return self._state.engine

    def train(
        self,
        tasks: Any,
        progress: bool | None = None,
        callbacks: Iterable[Callback] = (),
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> nn.Module:
        """Run the meta-iterations that are left and return the model, its weights at φ.

        An exception, an interrupt or a loss that is not finite leaves φ at the last completed
        meta-iteration; calling ``train`` again goes on from there.

        Args:
            tasks: a task distribution, anything with ``sample() -> task``; a task is anything
                with ``loss(model) -> scalar tensor``.
            progress: whether to show a progress bar; None: where there is a terminal.
            callbacks: each is called as ``callback(koi, record)`` after each meta-iteration. Those
                with ``state_dict`` and ``load_state_dict`` go on from a checkpoint as they were.
            checkpoint_dir: a folder for checkpoints, of which the last two are kept. The training
                is saved at its end, and where an error, Ctrl-C or SIGTERM stops it.
            checkpoint_every: meta-iterations from one checkpoint to the next as well.
            resume: go on from the newest good checkpoint in the folder, if there is one: what
                comes out is then, bit for bit, what a training that never stopped gives.
            log_dir: a folder for metrics.jsonl, which holds ``koi.history``, a line of JSON for
                each meta-iteration, and for TensorBoard's curves where that is installed.

        Raises:
            ConfigurationError: ``tasks`` cannot be sampled from, a schedule gave no number, or
                log_dir cannot be used.
            CheckpointError: a checkpoint cannot be written, or does not fit model or settings.
            TaskError: a loss that is no scalar or does not depend on the model.
            NonFiniteError: a loss that is NaN or infinite (with ``on_nonfinite="raise"``).
        """
        check_tasks(tasks)
        folder = Folder.given(checkpoint_dir, checkpoint_every, resume)
        callbacks = tuple(callbacks)
        state, settings, ready = self._state, self.settings, self._ready()
        total, carry = settings.num_iterations, settings.inner_state == "carry"
        device = self._phi(ready).params[0].device
        ranks = Ranks(device, settings.meta_batch_size, carry, self._interrupts)
        start.begin(self, state, tasks, callbacks, folder, resume, ranks)
        if state.pending is not None:
            ready.engines.refused |= state.ruled_out
        update = self._meta_update(ready)
        watch = Watch(ready.inner.algorithm, settings.num_steps, silent=not ranks.first)
        bar = ProgressBar(progress if ranks.first else False, total, state.iteration)
        saver = Autosave(self, state, folder, checkpoint_every, ranks)
        with ranks.agreed():
            logged = log_dir if ranks.first else None
            log = Log(logged, state.history, total, resume, saver.first_line)
        with bar, self._interrupts, ranks.training(update.phi), saver, log, state.training():
            start.let_go(state, saves=saver.saves)
            while state.iteration < self.settings.num_iterations:
                saver.before_iteration()
                ready = self._ready(ready)  # a callback may have changed anything
                record = self._meta_iteration(tasks, ready, watch, ranks)
                bar.advance(record)
                for callback in callbacks:
                    callback(self, record)
                log.after_iteration(saver.due)
                saver.after_iteration()
        return self.model

    def adapt(self, task: Any, num_steps: int | None = None) -> nn.Module:
        """Return a new module adapted to ``task``; ``koi.model`` stays as it is.

        Args:
            task: anything with ``loss(model)``.
            num_steps: inner steps; None: as in training.

        Raises:
            TaskError, NonFiniteError: as in `train`, also with ``on_nonfinite="skip"``.
        """
        num_steps, seed, ready = self._steps(num_steps), self.settings.seed, self._ready()
        inner = replace(ready.inner, skip_nonfinite=False)
        engine = EagerEngine(self.model, inner, share=False)
        self._state.engine = "eager"
        place = Place(seed, "adaptation", 0)
        with preserved_generators(seed):
            return engine.adapt(self._phi(ready), task, num_steps, place)

    def evaluate(
        self, tasks: Any, num_tasks: int = 100, num_steps: int | None = None
    ) -> Evaluation:
        """Adapt to ``num_tasks`` tasks and measure each on its query set, step by step.

        A task without ``query`` is measured by its ``loss``. With a seed every call sees the same
        tasks. ``koi.model`` stays as it is.

        Args:
            tasks: a task distribution.
            num_tasks: how many tasks to sample.
            num_steps: inner steps on each; None: as in training.

        Raises:
            TaskError: as in `train`.
            NonFiniteError: a query loss is NaN or infinite; with ``on_nonfinite="skip"`` the task
                is left out and counted, and it is an error only if all are.
        """
        rows = self._over_tasks("evaluate", tasks, num_tasks, num_steps)
        return Evaluation(rows, num_tasks - len(rows))

    def measure(
        self, tasks: Any, metric: Metric, num_tasks: int = 100, num_steps: int | None = None
    ) -> Tensor:
        """Adapt to ``num_tasks`` tasks and return ``metric(model, task)`` of each.

        The tasks are those that `evaluate` sees, and are adapted to by the same engine, many at
        once where they can be; the metric is called for one task after the other, without
        gradients, and may do what it likes. ``koi.model`` stays as it is.

        Args:
            tasks: a task distribution.
            metric: a callable of the module adapted to a task and the task; returns a tensor, of
                the same shape for every task.
            num_tasks: how many tasks to sample.
            num_steps: inner steps on each; None: as in training.

        Returns:
            The metrics, shape (kept, …), one for each task that is kept: all, but for those that
            ``on_nonfinite="skip"`` leaves out, an adapted parameter being NaN or infinite.

        Raises:
            TaskError, NonFiniteError: as in `evaluate`, or the metric returned no tensor.

        >>> from koi.problems import Lines
        >>> koi = Koi(torch.nn.Linear(1, 1), step_size=0.02)
        >>> def worst(model, task):
        ...     return (model(task.query_inputs) - task.query_targets).abs().max()
        >>> koi.measure(Lines(), worst, num_tasks=3).shape
        torch.Size([3])
        """
        return self._over_tasks("measure", tasks, num_tasks, num_steps, metric)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training needs to go on, in copies that stay as they are.

        That is φ and the buffers, the optimizers' states, settings, history, the state of the task
        distribution and callbacks of the last training (where they have ``state_dict``) and,
        without a seed, of the global generators. Settings that are code are not in it, nor are
        frozen parameters, of which it has a digest. ``torch.save`` can write it.
        """
        return deepcopy(checkpoint.contents(self, self._state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, as if training had never stopped.

        Tasks, callbacks and generators take theirs as the next training begins.

        Raises:
            CheckpointError: the model or any setting is another: all differences are named, and
                nothing has changed.

        >>> koi, other = (Koi(torch.nn.Linear(2, 1), step_size=0.1) for _ in range(2))
        >>> other.load_state_dict(koi.state_dict())
        >>> torch.equal(other.model.weight, koi.model.weight)
        True
        """
        self._state.check_idle()
        saved = checkpoint.saved_from(state, "given to load_state_dict")
        checkpoint.go_on(self, self._state, saved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` into one file, of which nothing is executed when it is read.

        Args:
            path: the file; it appears under this name whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        checkpoint.save(self, self._state, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, **settings: Any) -> Koi:
        """Return a learner that goes on from a file of `save` or of `train`.

        Args:
            path: the file. Nothing in it is executed.
            model: a module with the parameters and buffers that were saved; it is set to φ.
            settings: arguments of `Koi` that are code (a callable inner_optimizer,
                meta_step_size or meta_optimizer) must be given again; others may be, and replace
                those in the file.

        Raises:
            CheckpointError: the file cannot be read, does not fit the model, or needs settings.

        >>> import tempfile, torch
        >>> koi = Koi(torch.nn.Linear(2, 1), step_size=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     koi.save(folder + "/koi.safetensors")
        ...     same = Koi.load(folder + "/koi.safetensors", torch.nn.Linear(2, 1))
        >>> same.step_size, torch.equal(same.model.weight, koi.model.weight)
        (0.1, True)
        """
        saved, known = checkpoint.read_or_offer(Path(path)), inspect.signature(cls).parameters
        koi = cls(model, **checkpoint.arguments(saved, settings, known))
        checkpoint.begin_with(koi, koi._state, saved)
        return koi

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at φ."""
        return self.model(*args, **kwargs)

    def _meta_iteration(self, tasks: Any, ready: Ready, watch: Watch, ranks: Ranks) -> Record:
        began = time.perf_counter()
        settings, state, engine = self.settings, self._state, ready.engines
        seed, carry = state.seed(settings), settings.inner_state == "carry"
        update = self._meta_update(ready)
        ranks.adjust(update.phi, settings.meta_batch_size, carry)
        place = Place(seed, "meta-iteration", state.iteration)
        epsilon = value_at(settings.schedule, state.iteration / settings.num_iterations)

        def adapt(start: int, end: int) -> Outcome:
            batch = draw(tasks, settings.meta_batch_size, place).part(start, end)
            return engine.meta_batch(update.phi, batch, settings.num_steps, place)

        with preserved_generators(seed):
            own = ranks.attempt(adapt)
        state.engine, state.ruled_out = engine.name, engine.refused
        with self._interrupts.held():
            outcome = ranks.mean(own)
            norm = update.apply(outcome, epsilon) if outcome.losses else 0.0
            if outcome.losses and carry:
                state.keep(outcome.moments, update.phi.params, settings)
            losses, seconds = mean_ends(outcome.losses), time.perf_counter() - began
            record = Record(state.iteration, *losses, epsilon, norm, seconds, outcome.num_skipped)
            state.history.append(record)
            state.iteration += 1
        watch.look(outcome, epsilon, norm, settings.num_steps)
        return record

    def _over_tasks(
        self, what: str, tasks: Any, num_tasks: int, num_steps: int | None, *more: Any
    ) -> Tensor:
        """Draw tasks block by block; return what the engine makes of them, a row for each kept."""
        check_tasks(tasks)
        check_count("num_tasks", num_tasks)
        num_steps, seed, ready = self._steps(num_steps), self.settings.seed, self._ready()
        inner, engine, phi = ready.inner, ready.engines, self._phi(ready)
        kept: Tensors = []
        with preserved_generators(seed):
            for place, batch in blocks(tasks, num_tasks, seed):
                rows = getattr(engine, what)(phi, batch, num_steps, place, *more)
                kept += finite_rows(rows, place, inner) if what == "evaluate" else rows
        self._state.engine = engine.name
        return stacked(kept, num_tasks)

    def _ready(self, before: Ready | None = None) -> Ready:
        """Return the engines for the settings and the model as they are now."""
        ready = self._find_engines(before)
        check_surroundings(ready.tensors[0][0].device.type)
        return ready

    def _find_engines(self, before: Ready | None = None) -> Ready:
        state, settings = self._state, self.settings
        half = settings.autocast is torch.float16
        state.scale = (state.scale or LossScale()) if half else None
        return self._engines.ready(self.model, settings, state.scale, before)

    def _phi(self, ready: Ready) -> Phi:
        state, settings, rule = self._state, self.settings, ready.inner.rule
        params, buffers, constants = ready.tensors
        state.moments = state.carried(settings)
        if state.moments is not None and not same_tensors(params, state.moments_of[0]):
            log.warning("what learns has changed: inner moments of what is new start afresh")
            old, before = state.moments, state.moments_of[0]
            state.keep(rule.carried(old, before, params) if rule else None, params, settings)
        moments = state.moments if settings.inner_state == "carry" else None
        return Phi(params, buffers, constants, moments, ready.inner.learned)

    def _meta_update(self, ready: Ready) -> MetaUpdate:
        """Return the meta-update, the same as before where φ and meta_optimizer are the same."""
        phi, settings, update = self._phi(ready), self.settings, self._state.update
        if (
            update is None
            or update.make_optimizer is not settings.meta_optimizer
            or not same_tensors(update.phi.params, phi.params)
        ):
            update = MetaUpdate(ready.inner.algorithm, phi, settings.meta_optimizer)
            self._state.update = update
        update.phi, update.algorithm = phi, ready.inner.algorithm
        return update

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.settings.num_steps
        check_count("num_steps", num_steps, least=0)
        return num_steps
