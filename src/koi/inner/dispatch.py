"""Which engine runs: all tasks at once where that is possible and pays, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from koi.errors import EngineError, KoiError, NonFiniteError
from koi.inner.base import Engine, InnerLoop, Metric
from koi.inner.checks.selfcheck import DisagreementError, Request, SelfCheck
from koi.inner.eager import EagerEngine
from koi.inner.own_loop import check_engine
from koi.inner.reasons import advice_on, reason_of
from koi.inner.sharded import ShardedEngine
from koi.inner.vectorized import VectorizedEngine
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Outcome, Phi
from koi.randomness import Place, capture, restore
from koi.tasks import TaskBatch, has_own_loop, is_tensor_task

log = logging.getLogger("koi")
Result = TypeVar("Result")

# Measured on the CPU: uncompiled, two tasks at once take half as long again as one by one; with
# more parameters than these the weights of all tasks leave the cache, which takes twice as long,
# compiled up to half as long again.
_FEW_TASKS = 2
_MOST_PARAMETERS = 2**17
# Gathered, the patches of an image of more numbers leave the cache.
_LARGE_IMAGE = 2**12


class Dispatch:
    """Chooses how the tasks of a meta-batch run, at the first one, and runs them.

    With vectorize="auto" all tasks run at once where they can and where their number and the
    network let expect that it pays (`why_one_by_one`): nothing depends on a clock.

    Args:
        model: the user's module.
        inner: the settings of the inner loop.
        vectorize, compile, chunk_size: as in `koi.Koi`.
        check: whether a form is compared with the plainest way before it is used.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: InnerLoop,
        *,
        vectorize: bool | str,
        compile: bool | str,
        chunk_size: int | None,
        check: bool,
    ) -> None:
        if compile:
            from koi.inner.compiled.torch_internals import check_version

            check_version(compile)
        self._model, self._inner = model, inner
        self._vectorize = vectorize
        self._together = "vectorized+compiled" if compile else "vectorized"
        self._one_by_one = "compiled" if compile else "eager"
        self._compile = compile
        self._chunk_size = chunk_size
        self._check = check
        self._checked: set[tuple[str, str, type]] = set()
        self._engines: dict[str, Engine] = {}
        self.refused: set[str] = set()
        self._told: set[str] = set()
        self.name = "none yet"

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task of the batch."""
        request = Request(self._form(batch), "train", phi, batch, num_steps, place)
        return self._run(request, lambda e: e.meta_batch(phi, batch, num_steps, place))

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step."""
        request = Request(self._form(batch), "evaluate", phi, batch, num_steps, place)
        return self._run(request, lambda e: e.evaluate(phi, batch, num_steps, place))

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        request = Request(self._form(batch), "measure", phi, batch, num_steps, place)
        return self._run(request, lambda e: e.measure(phi, batch, num_steps, place, metric))

    def _form(self, batch: TaskBatch) -> str:
        """Return the form that tasks like these run in."""
        if has_own_loop(batch.example):
            check_engine(batch.example, self._vectorize, self._compile)
            if "own loop" not in self._told:
                self._told.add("own loop")
                log.info(
                    "tasks of %s adapt by themselves: inner_optimizer and step_size have no part "
                    "in it",
                    type(batch.example).__name__,
                )
            return "eager"
        if self._vectorize is True:
            return self._together
        if self._inner.learned.shards is not None:
            return self._one_by_one
        possible = self._vectorize == "auto" and len(batch) > 1 and is_tensor_task(batch.example)
        if not possible or self._together in self.refused:
            return self._one_by_one
        compiled, num_tasks = bool(self._compile), len(batch)
        shapes = batch.shapes
        why = why_one_by_one(self._model, self._inner, shapes, num_tasks, compiled=compiled)
        form = self._one_by_one if why else self._together
        if form not in self._told:
            self._told.add(form)
            log.info(
                "vectorize='auto' runs the tasks in the engine %s%s",
                form,
                f": {why}" if why else "",
            )
        return form

    def _run(self, request: Request, work: Callable[[Engine], Result]) -> Result:
        """Do the work in the given form, or one by one where that proves impossible."""
        self.name = form = request.form
        proved = form in self._engines
        states = None if proved else capture()
        try:
            engine = self._engines[form] if proved else self._make(form)
            self._compare(engine, request)
            result = work(engine)
        except NonFiniteError:
            raise
        except Exception as error:
            if proved and not isinstance(error, EngineError):
                raise
            slower = self._slower(form, error)
            if slower is None:
                raise
            if self._vectorize is True:
                raise refusal(error, request.batch) from error
            log.warning("%s; running one task at a time", refusal(error, request.batch))
            self.refused.add(form)
            if states is not None:
                restore(states)
            return self._run(request._replace(form=slower), work)
        self._engines[form] = engine
        return result

    def _slower(self, form: str, error: Exception) -> str | None:
        """Return the form to fall back to, None where there is none or the user asked for this."""
        if form == self._together:
            return self._one_by_one
        if form == "compiled" and isinstance(error, DisagreementError):
            self._one_by_one = "eager"
            return "eager"
        return None

    def _make(self, form: str) -> Engine:
        if form == "eager" and self._inner.learned.shards is not None:
            return ShardedEngine(self._model, self._inner, self._inner.learned.shards)
        if form == "eager":
            return EagerEngine(self._model, self._inner)
        if form == "vectorized":
            return VectorizedEngine(self._model, self._inner, self._chunk_size)
        from koi.inner.compiled.engine import CompiledEngine

        return CompiledEngine(
            self._model,
            self._inner,
            mode=self._compile,
            together=form == self._together,
            chunk_size=self._chunk_size,
        )

    def _compare(self, engine: Engine, request: Request) -> None:
        """Compare a form with the plainest way, before it first does such work on such tasks."""
        key = request.form, request.purpose, type(request.batch.example)
        cannot = self._inner.scale is not None or self._inner.learned.shards is not None
        if not self._check or key in self._checked or cannot:
            return
        if has_own_loop(request.batch.example):
            return
        rows = 1
        if request.form == self._together:
            request.batch.stacked  # noqa: B018 (says why where it cannot be done)
        if request.form == "vectorized+compiled":  # a graph is for one number of tasks
            rows = self._chunk_size or len(request.batch)
        elif request.form == "compiled":  # threads that share tasks are as many as at first
            rows = min(len(request.batch), torch.get_num_threads())
        SelfCheck(self._model, self._inner, engine, request, rows).run()
        self._checked.add(key)


def why_one_by_one(
    model: nn.Module,
    inner: InnerLoop,
    shapes: Sequence[torch.Size],
    num_tasks: int,
    *,
    compiled: bool,
) -> str | None:
    """Return why tasks that could run all at once are faster one by one; None where they are not.

    On the CPU alone: a GPU is idle with one task. ``shapes`` are those of the tensors of a task.
    """
    params = inner.learned.params_of(model)
    if params[0].device.type != "cpu":
        return None
    kinds = {type(part) for part in model.modules()}
    size = sum(param.numel() for param in params)
    if nn.Conv2d in kinds and any(
        len(shape) > 3 and shape[1:].numel() > _LARGE_IMAGE for shape in shapes
    ):
        return "torch's convolution of images as large as these takes one task at a time"
    if compiled and nn.Conv2d in kinds:
        alone = torch.get_num_threads() == 1
        return (
            "on one thread a task's convolutions keep its patches in the cache" if alone else None
        )
    if not compiled and num_tasks <= _FEW_TASKS:
        return f"{num_tasks} tasks at once take longer"
    if size > _MOST_PARAMETERS:
        return f"with {size:,} parameters each task is work enough"
    if compiled:
        return None
    # torch's kernel of a whole sequence, which cannot be mapped, is near the processor's rate; it
    # cannot be differentiated twice in good time
    if nn.LSTM in kinds and not inner.algorithm.second_order and params[0].dtype is torch.float32:
        return "an LSTM's kernel takes one task at a time"
    return None


def refusal(error: Exception, batch: TaskBatch) -> Exception:
    """Return the error that says why tasks cannot run all at once and how to mend it."""
    if isinstance(error, KoiError):
        return error
    name, why = type(batch.example).__name__, reason_of(error)
    advice = advice_on(error, "use vectorize=False, or see the documentation on own tasks")
    return EngineError(f"the tasks {name} cannot run all at once ({why}): {advice}")
