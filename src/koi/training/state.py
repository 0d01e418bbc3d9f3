"""The state of a training: all that it needs to go on besides the model and the settings."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from koi import randomness
from koi.errors import CheckpointError
from koi.inner.optimizers.rules import OptimizerFactory, UpdateRule
from koi.inner.scaling import LossScale
from koi.phi.arithmetic import Tensors, same_tensors
from koi.phi.average import ExponentialMean
from koi.phi.learned import Learned
from koi.phi.outcome import Phi
from koi.phi.update import MetaUpdate, Moves
from koi.randomness import States
from koi.records import History
from koi.settings import Settings
from koi.training import stateful

log = logging.getLogger("koi")

_beginning = threading.Lock()  # of two threads one is the first


class Mark(NamedTuple):
    """Where a meta-iteration draws from: what the seed does not determine.

    Args:
        tasks: a copy of the task distribution's ``state_dict()``; None where it has none.
        generators: the states of the global generators; None with a seed.
        seed: what several ranks that were given no seed draw from, or drew from before.
    """

    tasks: Any
    generators: States | None
    seed: int | None = None


@dataclass(frozen=True)
class Best:
    """The best that validation has measured in a training.

    Args:
        iteration: meta-iterations done by then.
        value: what was measured; the smaller, the better.
        misses: measurements since then.
        phi: φ, buffers and constants then; None: they are not kept.
        moments: the inner optimizer's then.
    """

    iteration: int
    value: float
    misses: int = 0
    phi: Tensors | None = field(default=None, repr=False, compare=False)
    moments: Tensors | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Owed:
    """What is still to be done for the last record, where a training was stopped.

    Args:
        num_callbacks: how many there were.
        validated: whether φ was measured, or that was not due.
        next_callback: the number of the first that has not returned.
        ends: whether one before it has returned ``koi.STOP``.
        calling: whether that one is being called.
    """

    num_callbacks: int
    validated: bool = False
    next_callback: int = 0
    ends: bool = False
    calling: bool = field(default=False, compare=False)

    def in_a_file(self) -> Owed:
        """Return what one owes who goes on from here: a callback that saves counts as done."""
        done = self.next_callback + self.calling
        return replace(self, next_callback=done, calling=False)


@dataclass(frozen=True)
class Running:
    """A method that trains, and the thread that it does so in; a copy of a learner has none."""

    method: str
    thread: str

    def __reduce__(self) -> Any:
        return type(None), ()


@dataclass(frozen=True)
class Pending:
    """What was loaded and only the next training can use."""

    mark: Mark
    callbacks: list[Any] | None


@dataclass
class TrainingState:
    """What `koi.Koi` has come to.

    Args:
        iteration: meta-iterations done.
        history: their records.
        engine: what the last of them ran in.
        ruled_out: forms of the inner loop that were found impossible.
        moments: the inner optimizer's, to start the next meta-iteration from.
        moments_of: the parameters that they belong to, and the setting that made the optimizer.
        learned_rates: the inner rates that φ holds; none without ``learn_step_size``.
        learned_rates_of: the parameters that they belong to, and the settings that made them.
        scale: the loss scale of float16.
        update: the meta-update, which has the meta-optimizer.
        mean: the exponential mean of φ; empty without ``average``.
        best: what validation has found; None: it has not measured yet.
        drawn_seed: of several ranks, or workers, that were given none.
        tasks: of the last training, for their state.
        callbacks: likewise, those that have a state.
        owed: what the last record is still owed; None: nothing.
        pending: what was loaded, until the next training has begun.
        begun: the number of the meta-iteration that has begun, and where it draws from.
        running: the method that trains just now.
    """

    iteration: int = 0
    history: History = field(default_factory=History)
    engine: str = "none yet"
    ruled_out: set[str] = field(default_factory=set)
    moments: Tensors | None = None
    moments_of: tuple[Tensors, str | OptimizerFactory | None] = ([], None)
    learned_rates: Tensors = field(default_factory=list)
    learned_rates_of: tuple[Tensors, Any] = ([], None)
    scale: LossScale | None = None
    update: MetaUpdate | None = None
    mean: ExponentialMean = field(default_factory=ExponentialMean)
    best: Best | None = None
    drawn_seed: int | None = None
    tasks: Any = None
    callbacks: tuple[Any, ...] = ()
    owed: Owed | None = None
    pending: Pending | None = None
    begun: tuple[int, Mark] | None = None
    running: Running | None = None

    def seed(self, settings: Settings) -> int | None:
        """Return what meta-iterations draw from: several ranks without a seed have drawn one."""
        return self.drawn_seed if settings.seed is None else settings.seed

    def draw_seed(self, settings: Settings) -> None:
        """Draw a seed where there is none, so that several processes see the same tasks."""
        if self.seed(settings) is None:
            self.drawn_seed = int(torch.randint(2**62, ()))

    def carried(self, settings: Settings) -> Tensors | None:
        """Return the moments that live on; None: there are none, or of another optimizer."""
        return self.moments if self.moments_of[1] == settings.inner_optimizer else None

    def keep(self, moments: Tensors | None, params: Tensors, settings: Settings) -> None:
        """Let moments of these parameters live on."""
        self.moments, self.moments_of = moments, (params, settings.inner_optimizer)

    def keep_after(self, phi: Phi, moments: Tensors | None, settings: Settings) -> None:
        """Keep what a meta-iteration that has moved φ leaves for the next ones."""
        if moments is not None:
            self.keep(moments, phi.params, settings)
        if settings.average is not None:
            self.mean.add([*phi.learned, *phi.buffers], settings.average)

    def phi(
        self,
        tensors: tuple[Tensors, Tensors, Tensors],
        names: Learned,
        rule: UpdateRule | None,
        settings: Settings,
        num_steps: int | None = None,
    ) -> Phi:
        """Return φ as the next meta-iteration starts from it, or as the last one ended.

        Args:
            tensors: parameters, buffers and constants.
            names: theirs.
            rule: the inner optimizer's.
            settings: the learner's.
            num_steps: inner steps of what comes after training; None: a meta-iteration comes.
        """
        params, buffers, constants = tensors
        self.moments = self.carried(settings)
        if self.moments is not None and not same_tensors(params, self.moments_of[0]):
            log.warning("what learns has changed: inner moments of what is new start afresh")
            old, before = self.moments, self.moments_of[0]
            self.keep(rule.carried(old, before, params) if rule else None, params, settings)
        moments = self.moments if settings.inner_state == "carry" else None
        at = self.iteration if num_steps is None else max(0, self.iteration - 1)
        steps = settings.num_steps if num_steps is None else num_steps
        rates = settings.rates(names, at, steps)
        learned = self.rates(params, names, settings)
        return Phi(params, buffers, constants, moments, names, rates, learned)

    def rates(self, params: Tensors, names: Learned, settings: Settings) -> Tensors:
        """Return the inner rates that φ holds, anew where parameters or settings are others."""
        how = settings.learned_rates(names)
        if how is None:
            return []
        before, made_by = self.learned_rates_of
        if made_by != _of_rates(settings) or not same_tensors(params, before):
            if self.learned_rates:
                log.warning("what learns, or step_size, has changed: learned rates start afresh")
            first = how.first(params, settings.step_size, settings.num_steps)
            self.keep_rates(first, params, settings)
        return self.learned_rates

    def keep_rates(self, rates: Tensors, params: Tensors, settings: Settings) -> None:
        """Let learned rates of these parameters be a part of φ."""
        self.learned_rates, self.learned_rates_of = rates, (params, _of_rates(settings))

    def meta_update(self, phi: Phi, algorithm: Moves, settings: Settings) -> MetaUpdate:
        """Return the meta-update, the same as before where φ and meta_optimizer are the same."""
        update = self.update
        if (
            update is None
            or update.make_optimizer is not settings.meta_optimizer
            or not same_tensors(update.phi.learned, phi.learned)
        ):
            update = self.update = MetaUpdate(algorithm, phi, settings.meta_optimizer)
        update.phi, update.algorithm = phi, algorithm
        return update

    def mark(self, settings: Settings) -> Mark:
        """Return where the next meta-iteration, or the one that has begun, draws from."""
        if self.pending is not None:
            return self.pending.mark
        if self.begun is not None and self.begun[0] == self.iteration:
            return self.begun[1]
        tasks = self.tasks.state_dict() if hasattr(self.tasks, "state_dict") else None
        with randomness.alone():
            generators = randomness.capture() if settings.seed is None else None
        return Mark(copy.deepcopy(tasks), generators, self.drawn_seed)

    def go_back_to(self, mark: Mark) -> None:
        """Let tasks and generators draw from where they did."""
        stateful.give_state(self.tasks, mark.tasks)
        if mark.generators is not None:
            with randomness.alone():
                randomness.restore(mark.generators)

    def remember(self, settings: Settings) -> None:
        """Remember where the meta-iteration that begins draws from, should it not be completed."""
        self.begun = None
        self.begun = self.iteration, self.mark(settings)

    @contextmanager
    def training(self, method: str) -> Iterator[None]:
        """Let nothing else train or be loaded while the block runs, in any thread.

        Raises:
            CheckpointError: a training runs.
        """
        running = Running(method, threading.current_thread().name)
        try:
            with _beginning:
                self.check_idle(method)
                self.running = running
            yield
        finally:
            if self.running is running:
                self.running = None

    def check_idle(self, method: str) -> None:
        """Check that no training runs, which another method would change in its midst.

        Raises:
            CheckpointError: one does.
        """
        there, here = self.running, threading.current_thread().name
        if there is not None and there.thread == here:
            raise CheckpointError(
                f"{method} was called while {there.method} runs, by a callback or a task: let the "
                "training end first (a callback may return koi.STOP)"
            )
        if there is not None:
            raise CheckpointError(
                f"{method} was called in the thread {here} while {there.method} of the same Koi "
                f"runs in {there.thread}: let it end first, or give each thread a Koi of its own"
            )


def _of_rates(settings: Settings) -> Any:
    """Return what learned rates are made of."""
    return settings.learn_step_size, settings.step_size


def stored_rates(rates: Tensors, kind: str | None, phi: Phi, settings: Settings) -> Tensors:
    """Return copies of learned rates where φ is now; the first ones, where they were others.

    Args:
        rates: what was stored.
        kind: of which ``learn_step_size``.
        phi: φ.
        settings: the learner's.
    """
    how = settings.learned_rates(phi.names)
    if how is None:
        return []
    fresh = how.first(phi.params, settings.step_size, settings.num_steps)
    if kind != settings.learn_step_size:
        return fresh
    return [rate.to(own.device, copy=True) for rate, own in zip(rates, fresh, strict=True)]
