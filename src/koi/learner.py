"""The learner: meta-learning of any module on any tasks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koi.algorithms import Algorithm, algorithm_of, schedule_of
from koi.configuration import check_count, check_surroundings, check_tasks
from koi.engines import Engines, Ready
from koi.evaluation import Evaluation, blocks, stacked
from koi.inner.base import Metric, finite_rows
from koi.inner.eager import EagerEngine
from koi.inner.optimizers.rules import OptimizerFactory
from koi.inner.scaling import LossScale
from koi.phi.outcome import Outcome, Phi
from koi.phi.parameters import Tensors, same_tensors
from koi.phi.update import MetaOptimizerFactory, MetaUpdate, Schedule, value_at
from koi.randomness import Place, preserved_generators
from koi.ranks.group import Ranks
from koi.records import Record, mean_ends
from koi.sampling import draw
from koi.settings import Configured
from koi.training import checkpoint
from koi.training.autosave import Autosave
from koi.training.checkpoint import Pending
from koi.training.interrupts import Interrupts
from koi.training.logs import Log
from koi.training.progress import ProgressBar
from koi.training.watch import Watch

log = logging.getLogger("koi")
Callback = Callable[["Koi", Record], None]


class Koi(Configured):
    """Finds an initialisation φ of ``model`` from which a few steps learn a new task.

    Each meta-iteration samples meta_batch_size tasks, takes num_steps optimizer steps on each
    task's loss from φ, which gives φ̃_1 … φ̃_n, and moves φ by the meta-update
    φ ← φ + ε · mean(φ̃_i − φ) (Reptile; Nichol, Achiam, Schulman, arXiv 1803.02999, algorithm 2).

    φ is the weights of ``model`` itself: they change once a meta-iteration, wholly or not at all.
    All inner steps are taken on a copy.

    Args:
        model: any module; its current weights are the first φ.
        step_size: learning rate of the inner optimizer.
        num_steps: inner steps on each task.
        num_iterations: meta-iterations.
        meta_step_size: ε, a number or a schedule of the fraction done in [0, 1]; None:
            ``koi.linear(1.0, 0.0)``, but step_size for FOMAML and MAML.
        meta_batch_size: tasks in each meta-iteration.
        inner_optimizer: "sgd", "adam" (both as torch.optim's defaults have them), or a callable
            (params, lr) that returns a ``torch.optim.Optimizer``.
        inner_state: whether momentum and adaptive moments live on from task to task ("carry", as
            in the paper's code; over a meta-batch they are averaged) or start afresh ("reset").
        meta_optimizer: None, or a callable (params) that returns a ``torch.optim.Optimizer``; it
            is fed the gradient φ − mean(φ̃) and replaces ε (for the parameters; buffers follow ε).
        algorithm: "reptile"; "eigen-reptile", which moves φ along the main direction of the way to
            φ̃; "fomaml" and "maml", which move φ against the gradient of the query loss at φ̃, taken
            with respect to φ̃ or, through all inner steps, to φ; or a `koi.algorithms.Algorithm`.
        seed: makes runs repeatable, bit for bit on one machine, and independent of the global
            random state. None: tasks draw from the global generators as they are.
        on_nonfinite: what a NaN or infinite loss does: "raise" an error, or "skip" the task.
        check: whether Koi compares the engine that it chose with a plain loop on the first one or
            two tasks, and again when what the engine takes for granted has changed.

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

    def __init__(
        self,
        model: nn.Module,
        step_size: float = 0.01,
        num_steps: int = 10,
        num_iterations: int = 1000,
        *,
        meta_step_size: float | Schedule | None = None,
        meta_batch_size: int = 1,
        inner_optimizer: str | OptimizerFactory = "sgd",
        inner_state: str = "carry",
        meta_optimizer: MetaOptimizerFactory | None = None,
        algorithm: str | Algorithm = "reptile",
        vectorize: str | bool = "auto",
        compile: bool | str = False,
        seed: int | None = None,
        on_nonfinite: str = "raise",
        chunk_size: int | None = None,
        autocast: torch.dtype | None = None,
        check: bool = True,
    ) -> None:
        given = {n: v for n, v in locals().items() if n not in ("self", "__class__")}
        super().__init__(given)
        self.iteration = 0
        self.history: list[Record] = []
        self._moments: Tensors | None = None
        self._moments_of: Tensors = []
        self._scale: LossScale | None = None
        self._update: MetaUpdate | None = None
        self._interrupts = Interrupts()
        self._tasks: Any = None  # of the last training, for their state
        self._callbacks: tuple[Any, ...] = ()  # likewise, those that have a state
        self._pending: Pending | None = None
        self._drawn_seed: int | None = None  # of several ranks that were given none
        self.engine = "none yet"
        self._ruled_out: set[str] = set()
        self._engines = Engines()
        self._find_engines()  # so that a mistake shows here, not after the first sampling

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
        ready = self._ready()
        device = self._phi(ready).params[0].device
        carry = self.inner_state == "carry"
        ranks = Ranks(device, self.meta_batch_size, carry, self._interrupts)
        callbacks = tuple(callbacks)
        autosave = Autosave(self, tasks, checkpoint_dir, checkpoint_every, resume, ranks, callbacks)
        ready.engines.refused |= autosave.ruled_out
        update = self._meta_update(ready)
        watch = Watch(algorithm_of(self.algorithm), self.num_steps, silent=not ranks.first)
        bar = ProgressBar(progress if ranks.first else False, self.num_iterations, self.iteration)
        with ranks.agreed():
            folder = log_dir if ranks.first else None
            log = Log(folder, self.history, self.num_iterations, resume, autosave.begun)
        with bar, self._interrupts, ranks.training(update.phi), autosave, log:
            while self.iteration < self.num_iterations:
                autosave.before_iteration()
                ready = self._ready(ready)  # a callback may have changed anything
                record = self._meta_iteration(tasks, ready, watch, ranks)
                bar.advance(record)
                for callback in callbacks:
                    callback(self, record)
                log.after_iteration(autosave.due)
                autosave.after_iteration()
        return self.model

    def adapt(self, task: Any, num_steps: int | None = None) -> nn.Module:
        """Return a new module adapted to ``task``; ``koi.model`` stays as it is.

        Args:
            task: anything with ``loss(model)``.
            num_steps: inner steps; None: as in training.

        Raises:
            TaskError, NonFiniteError: as in `train`, also with ``on_nonfinite="skip"``.
        """
        num_steps = self._steps(num_steps)
        ready = self._ready()
        inner = replace(ready.inner, skip_nonfinite=False)
        engine = EagerEngine(self.model, inner, share=False)
        self.engine = "eager"
        place = Place(self.seed, "adaptation", 0)
        with preserved_generators(self.seed):
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that training needs to go on into one file.

        It holds φ and the buffers, the optimizers' states, settings, history, the state of the
        task distribution and callbacks of the last training (where they have ``state_dict``) and,
        without a seed, of the global generators. Settings that are code are not in it, nor are
        frozen parameters, of which it has a digest.

        Args:
            path: the file; it appears under this name whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        checkpoint.save(self, Path(path))

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
        return checkpoint.load(cls, Path(path), model, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at φ."""
        return self.model(*args, **kwargs)

    def _meta_iteration(self, tasks: Any, ready: Ready, watch: Watch, ranks: Ranks) -> Record:
        began = time.perf_counter()
        seed, engine, update = self._seed, ready.engines, self._meta_update(ready)
        ranks.adjust(update.phi, self.meta_batch_size, self.inner_state == "carry")
        place = Place(seed, "meta-iteration", self.iteration)
        schedule = schedule_of(self.meta_step_size, self.algorithm, self.step_size)
        epsilon = value_at(schedule, self.iteration / self.num_iterations)

        def adapt(start: int, end: int) -> Outcome:
            batch = draw(tasks, self.meta_batch_size, place).part(start, end)
            return engine.meta_batch(update.phi, batch, self.num_steps, place)

        with preserved_generators(seed):
            own = ranks.attempt(adapt)
        self.engine, self._ruled_out = engine.name, engine.refused
        with self._interrupts.held():
            outcome = ranks.mean(own)
            norm = update.apply(outcome, epsilon) if outcome.losses else 0.0
            if outcome.losses and self.inner_state == "carry":
                self._moments, self._moments_of = outcome.moments, update.phi.params
            losses, seconds = mean_ends(outcome.losses), time.perf_counter() - began
            record = Record(self.iteration, *losses, epsilon, norm, seconds, outcome.num_skipped)
            self.history.append(record)
            self.iteration += 1
        watch.look(outcome, epsilon, norm, self.num_steps)
        return record

    def _over_tasks(
        self, what: str, tasks: Any, num_tasks: int, num_steps: int | None, *more: Any
    ) -> Tensor:
        """Draw tasks block by block; return what the engine makes of them, a row for each kept."""
        check_tasks(tasks)
        check_count("num_tasks", num_tasks)
        num_steps = self._steps(num_steps)
        ready = self._ready()
        inner, engine, phi = ready.inner, ready.engines, self._phi(ready)
        kept: Tensors = []
        with preserved_generators(self.seed):
            for place, batch in blocks(tasks, num_tasks, self.seed):
                rows = getattr(engine, what)(phi, batch, num_steps, place, *more)
                kept += finite_rows(rows, place, inner) if what == "evaluate" else rows
        self.engine = engine.name
        return stacked(kept, num_tasks)

    @property
    def _seed(self) -> int | None:
        """What meta-iterations draw from: several ranks without a seed have drawn one."""
        return self._drawn_seed if self.seed is None else self.seed

    def _ready(self, before: Ready | None = None) -> Ready:
        """Return the engines for the settings and the model as they are now."""
        ready = self._find_engines(before)
        check_surroundings(ready.tensors[0][0].device.type)
        return ready

    def _find_engines(self, before: Ready | None = None) -> Ready:
        half = self.autocast is torch.float16
        self._scale = (self._scale or LossScale()) if half else None
        return self._engines.ready(self, self._scale, self._seed is not None, before)

    def _phi(self, ready: Ready) -> Phi:
        rule, (params, buffers, constants) = ready.inner.rule, ready.tensors
        if self._moments is not None and not same_tensors(params, self._moments_of):
            log.warning("what learns has changed: inner moments of what is new start afresh")
            old, before = self._moments, self._moments_of
            self._moments = rule.carried(old, before, params) if rule else None
            self._moments_of = params
        moments = self._moments if self.inner_state == "carry" else None
        return Phi(params, buffers, constants, moments, ready.inner.learned)

    def _meta_update(self, ready: Ready) -> MetaUpdate:
        """Return the meta-update, the same as before where φ and meta_optimizer are the same."""
        phi, update = self._phi(ready), self._update
        if (
            update is None
            or update.make_optimizer is not self.meta_optimizer
            or not same_tensors(update.phi.params, phi.params)
        ):
            update = self._update = MetaUpdate(ready.inner.algorithm, phi, self.meta_optimizer)
        update.phi, update.algorithm = phi, ready.inner.algorithm
        return update

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.num_steps
        check_count("num_steps", num_steps, least=0)
        return num_steps
