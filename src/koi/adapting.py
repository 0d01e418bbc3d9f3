"""What a learner does with φ where it does not train: adapt to tasks, and measure on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from koi import allowed
from koi.engines import Engines, Ready, check_surroundings
from koi.evaluation import Evaluation, blocks, stacked
from koi.inner.base import Metric, finite_rows
from koi.inner.eager import EagerEngine
from koi.inner.scaling import LossScale
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Phi
from koi.phi.rates import StepSize
from koi.randomness import Place, preserved_generators
from koi.sampling import check_task, check_tasks
from koi.settings import Settings, check_count
from koi.stored import Stored


class Adapting(Stored):
    """A learner that can adapt to tasks."""

    _engines: Engines

    def adapt(
        self, task: Any, num_steps: int | None = None, step_size: StepSize | None = None
    ) -> nn.Module:
        """Return a new module adapted to ``task``; ``koi.model`` stays as it is.

        Args:
            task: anything with ``loss(model)``.
            num_steps: inner steps; None: as in training.
            step_size: the inner rate, as the setting; None: that of the last meta-iteration.

        Raises:
            ConfigurationError: ``task`` is none.
            TaskError, NonFiniteError: as in `train`, also with ``on_nonfinite="skip"``.
        """
        check_task(task)
        settings = self.settings.at(step_size)
        num_steps, place = settings.steps(num_steps), Place(settings.seed, "adaptation", 0)
        with preserved_generators(settings.seed):
            ready = self._ready(None, settings)
            inner = replace(ready.inner, skip_nonfinite=False)
            engine = EagerEngine(self.model, inner, share=False)
            self._state.engine = "eager"
            return engine.adapt(self._phi(ready, settings, num_steps), task, num_steps, place)

    def evaluate(
        self,
        tasks: Any,
        num_tasks: int = 100,
        num_steps: int | None = None,
        step_size: StepSize | None = None,
    ) -> Evaluation:
        """Adapt to ``num_tasks`` tasks and measure each on its query set, step by step.

        A task without ``query`` is measured by its ``loss``. With a seed every call sees the same
        tasks. ``koi.model`` stays as it is.

        Args:
            tasks: a task distribution.
            num_tasks: how many tasks to sample.
            num_steps: inner steps on each; None: as in training.
            step_size: the inner rate; None: that of the last meta-iteration.

        Raises:
            TaskError: as in `train`.
            NonFiniteError: a query loss is NaN or infinite; with ``on_nonfinite="skip"`` the task
                is left out and counted, and it is an error only if all are.
        """
        settings = self.settings.at(step_size)
        rows = self._over_tasks("evaluate", tasks, num_tasks, num_steps, settings)
        return Evaluation(rows, num_tasks - len(rows))

    def measure(
        self,
        tasks: Any,
        metric: Metric,
        num_tasks: int = 100,
        num_steps: int | None = None,
        step_size: StepSize | None = None,
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
            step_size: the inner rate; None: that of the last meta-iteration.

        Returns:
            The metrics, shape (kept, …), one for each task that is kept: all, but for those that
            ``on_nonfinite="skip"`` leaves out, an adapted parameter being NaN or infinite.

        Raises:
            TaskError, NonFiniteError: as in `evaluate`, or the metric returned no tensor.

        >>> from koi import Koi
        >>> from koi.problems import Lines
        >>> koi = Koi(torch.nn.Linear(1, 1), step_size=0.02)
        >>> def worst(model, task):
        ...     return (model(task.query_inputs) - task.query_targets).abs().max()
        >>> koi.measure(Lines(), worst, num_tasks=3).shape
        torch.Size([3])
        """
        allowed.check(metric=(metric, allowed.code("(model, task) that returns a tensor")))
        settings = self.settings.at(step_size)
        return self._over_tasks("measure", tasks, num_tasks, num_steps, settings, metric)

    def _over_tasks(
        self,
        what: str,
        tasks: Any,
        num_tasks: int,
        num_steps: int | None,
        settings: Settings,
        *more: Any,
    ) -> Tensor:
        """Draw tasks block by block; return what the engine makes of them, a row for each kept."""
        check_tasks(tasks)
        check_count("num_tasks", num_tasks, most=10**9)
        num_steps = settings.steps(num_steps)
        kept: Tensors = []
        with preserved_generators(settings.seed):
            ready = self._ready(None, settings)
            inner, engine = ready.inner, ready.engines
            phi = self._phi(ready, settings, num_steps)
            for place, batch in blocks(tasks, num_tasks, settings.seed):
                rows = getattr(engine, what)(phi, batch, num_steps, place, *more)
                kept += finite_rows(rows, place, inner) if what == "evaluate" else rows
            self._state.engine = engine.name
        return stacked(kept, num_tasks)

    def _validation_loss(self, tasks: Any) -> float:
        settings = replace(self.settings, seed=self.settings.seed or 0)
        rows = self._over_tasks("evaluate", tasks, 100, None, settings)
        return Evaluation(rows).after

    def _ready(self, before: Ready | None = None, settings: Settings | None = None) -> Ready:
        """Return the engines for settings, None: the learner's, and the model as it is now."""
        ready = self._find_engines(before, settings or self.settings)
        check_surroundings(ready.tensors[0][0].device.type)
        return ready

    def _find_engines(self, before: Ready | None, settings: Settings) -> Ready:
        state = self._state
        half = settings.autocast is torch.float16
        state.scale = (state.scale or LossScale()) if half else None
        return self._engines.ready(self.model, settings, state.scale, before)

    def _phi(self, ready: Ready, settings: Settings, num_steps: int | None = None) -> Phi:
        inner = ready.inner
        return self._state.phi(ready.tensors, inner.learned, inner.rule, settings, num_steps)
