"""One task at a time: any task, any module, any optimizer.

The steps are taken in place on one working copy of the user's module, so that a task costs no copy
of the state and no new optimizer. That copy is set back before each task; φ is only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koi.algorithms import given
from koi.inner.base import (
    InnerLoop,
    Metric,
    depends_on_model,
    explained,
    finite_tasks,
    metrics_of,
    scalar,
)
from koi.inner.functional import PureLoss
from koi.inner.layers.normalisation import map_weight_norm
from koi.inner.optimizers.bound import bound_optimizer
from koi.inner.own_loop import (
    adapt_by_itself,
    check_algorithm,
    check_alike,
    check_measured,
    check_settings,
)
from koi.inner.second_order import SecondOrderEngine
from koi.inner.stepwise import Adapted, Given
from koi.inner.working import WorkingCopy
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Outcome, OutcomeMean, Phi
from koi.randomness import Place
from koi.tasks import TaskBatch, has_own_loop, query_of, views


class Kept(NamedTuple):
    """A task's losses, in a list that is empty if it is skipped, and how far it would take φ."""

    losses: list[list[float]]
    distance: float


class EagerEngine(SecondOrderEngine):
    """Runs the tasks of a meta-batch one after the other.

    Args:
        model: the user's module.
        inner: the settings of the inner loop.
        share: whether frozen parameters are the user's own; what `adapt` gives away has its own.
    """

    def __init__(self, model: nn.Module, inner: InnerLoop, *, share: bool = True) -> None:
        self.inner = inner
        prepare = map_weight_norm if inner.algorithm.second_order else None
        self.copy = WorkingCopy(model, inner.learned, share=share, prepare=prepare)
        self.params = self.copy.params
        self.precision = inner.precision(self.params[0].device)
        self.optimizer = bound_optimizer(inner, self.params)
        self.has_buffers = bool(inner.learned.buffers or inner.learned.constants)

    @torch.enable_grad()
    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to each task in turn."""
        check_alike(batch.tasks)
        means, distance = OutcomeMean(copy=len(batch) > 1), None
        for number, task in enumerate(batch.tasks, start=batch.first):
            with explained(place, number, 1):
                place.set("inner", number)
                adapted = self._of_task(phi, task, num_steps)
                if adapted is None:
                    continue
                with torch.no_grad():
                    way = self.inner.algorithm.meta_gradient(phi.learned, adapted.given)
                losses, distance = self._finite(way, adapted.losses, number, place)
                buffers, constants = self.copy.end()
                moved = arithmetic.movements(buffers, phi.buffers)
            if losses:
                weights = batch.weights_of([number - batch.first])
                means.add(adapted.given, moved, constants, adapted.moments, losses, weights)
        return means.outcome(len(batch), distance if len(batch) == 1 else None)

    @torch.enable_grad()
    def adapt(self, phi: Phi, task: Any, num_steps: int, place: Place) -> nn.Module:
        """Return the working copy, adapted to one task."""
        with explained(place, 0, 1):
            place.set("inner", 0)
            adapted = self._adapted(phi, task, num_steps)
            self._finite(adapted.params, adapted.losses, 0, place)
            self.copy.check()
        return self.copy.module

    @torch.enable_grad()
    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step, shape (tasks, steps + 1)."""
        rows = []
        for number, task in enumerate(batch.tasks):
            curve: Tensors = []
            with explained(place, number, 1):
                place.set("inner", number)
                measure = partial(self._measure, query_of(task), curve)
                if has_own_loop(task):
                    check_measured(query_of(task))
                    for count in range(num_steps + 1):  # anew: only its end is known
                        place.set("inner", number)
                        self._adapted(phi, task, count)
                        measure()
                else:
                    self.adapt_to(phi, views(task, num_steps), measure)
                self.copy.check()
            rows.append(torch.stack(curve))
        return torch.stack(rows)

    @torch.enable_grad()
    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        values: Tensors = []
        for number, task in enumerate(batch.tasks):
            with explained(place, number, 1):
                place.set("inner", number)
                self._adapted(phi, task, num_steps)
                self.copy.check()
                module = self.copy.module
                values += metrics_of(metric, module, task, self.inner, number, place)
        return values

    def _of_task(self, phi: Phi, task: Any, num_steps: int) -> Given | None:
        """Return what the algorithm makes of a task; None where float16 overflowed."""
        if not has_own_loop(task):
            return self.run(phi, task, views(task, num_steps), num_steps)
        check_algorithm(task, self.inner)
        adapted = self._adapted(phi, task, num_steps)
        end = self.inner.learned.those_learned(adapted.params)
        with torch.no_grad():
            found = given(self.inner.algorithm, phi.learned, end, [], [])
        return Given(found, adapted.moments, adapted.losses)

    def _adapted(self, phi: Phi, task: Any, num_steps: int) -> Adapted:
        """Return where the inner loop ends: Koi's own, or the task's."""
        if not has_own_loop(task):
            return self.adapt_to(phi, views(task, num_steps))
        check_settings(task, self.copy.module, self.inner, phi)
        start = self.adapt_to(phi, [])  # moments stay as they are
        adapt_by_itself(task, self.copy.module, self.inner, num_steps)
        return start

    def begin(self, phi: Phi) -> None:
        """Set the working copy to φ."""
        self.copy.begin(phi)

    def loss(self, view: Any, step: int, params: Tensors | None = None) -> Tensor:
        """Return the loss of the working copy, or of ``params`` in its place."""
        module = self.copy.module
        with self.precision:
            if params is None:
                loss = scalar(view.loss(module), view, step)
            else:
                pure = PureLoss(module, self.inner.learned)
                loss = scalar(pure(params, view), view, step)
        return depends_on_model(loss, view, step)

    def rows(self, tensors: Sequence[Tensor]) -> Tensors:
        """Return the tensors: a single task runs."""
        return list(tensors)

    def each(self, function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        """Return the function: a single task runs."""
        return function

    def buffers_now(self) -> Tensors:
        """Return copies of the buffers and constants."""
        return arithmetic.clone(self._moving()) if self.has_buffers else []

    def put_buffers(self, values: Tensors) -> None:
        """Let the buffers and constants have these values."""
        if values:
            arithmetic.copy_(self._moving(), values)

    def can_repeat(self) -> bool:
        """Return whether the working copy holds nothing else than it began with."""
        return self.copy.as_it_began

    def _moving(self) -> Tensors:
        names, module = self.inner.learned, self.copy.module
        return [*names.buffers_of(module), *names.constants_of(module)]

    def buffers_kept(self) -> AbstractContextManager[None]:
        """Undo what a loss that is no inner step does to the module."""
        return self.copy.kept()

    def _finite(self, way: Tensors, each: Tensor, number: int, place: Place) -> Kept:
        """Return the task's losses, none if it is skipped, and how long its way is."""
        moved = arithmetic.norms(way)
        figures = torch.cat([each, moved]).tolist()
        losses, distance = figures[: -len(moved)], math.hypot(*figures[-len(moved) :])
        kept = finite_tasks([losses], [distance], number, place, self.inner.skip_nonfinite)
        return Kept([losses] if kept else [], distance)

    def _measure(self, query: Any, curve: Tensors) -> None:
        step = len(curve)
        # with gradients, since a loss may be made of derivatives of the model
        with self.buffers_kept(), self.precision:
            curve.append(scalar(query.loss(self.copy.module), query, step).detach())
