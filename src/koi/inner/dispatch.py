"""Which engine runs: all tasks at once where that is possible and pays, else one by one."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from koi.errors import EngineError, KoiError, NonFiniteError
from koi.inner.base import Engine, InnerLoop, Metric, advice_on, reason_of
from koi.inner.checks.selfcheck import DisagreementError, Request, SelfCheck
from koi.inner.eager import EagerEngine
from koi.inner.layers.recurrence import faster_alone
from koi.inner.vectorized import VectorizedEngine
from koi.phi.outcome import Outcome, Phi
from koi.phi.parameters import Tensors
from koi.randomness import Place, capture, restore
from koi.tasks import TaskBatch, is_tensor_task

log = logging.getLogger("koi")
Result = TypeVar("Result")

# Each form runs this often before the fastest is kept; the first run, a warm-up, does not count.
_TRIALS = 4


class Dispatch:
    """Chooses how the tasks of a meta-batch run, at the first one, and runs them.

    With vectorize="auto" all tasks run at once where they can. Without a seed the forms that are
    possible take turns over the first meta-iterations, and the fastest is kept; every form does
    the same update, so that no work is lost. With a seed nothing may depend on a clock: all at
    once wherever possible, but for networks known to be faster one by one.

    Args:
        model: the user's module.
        inner: the settings of the inner loop.
        vectorize, compile, chunk_size: as in `koi.Koi`.
        seeded: whether draws are a function of place.
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
        seeded: bool,
        check: bool,
    ) -> None:
        self._model, self._inner = model, inner
        self._vectorize = vectorize
        self._together = "vectorized+compiled" if compile else "vectorized"
        self._one_by_one = "compiled" if compile else "eager"
        self._compile = compile
        self._chunk_size = chunk_size
        self._seeded = seeded
        self._alone = not compile and not inner.algorithm.second_order and faster_alone(model)
        self._check = check
        self._checked: set[tuple[str, str, type]] = set()
        self._engines: dict[str, Engine] = {}
        self.refused: set[str] = set()
        self._seconds: dict[str, list[float]] = {}
        self.name = "none yet"

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task of the batch."""

        def work(engine: Engine) -> Outcome:
            began = time.perf_counter()
            outcome = engine.meta_batch(phi, batch, num_steps, place)
            seconds = self._seconds.setdefault(self.name, [])
            if len(seconds) < _TRIALS:
                seconds.append(time.perf_counter() - began)
            return outcome

        request = Request(self._turn(batch), "train", phi, batch, num_steps, place)
        return self._run(request, work)

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step."""
        request = Request(self._forms(batch)[0], "evaluate", phi, batch, num_steps, place)
        return self._run(request, lambda e: e.evaluate(phi, batch, num_steps, place))

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        request = Request(self._forms(batch)[0], "measure", phi, batch, num_steps, place)
        return self._run(request, lambda e: e.measure(phi, batch, num_steps, place, metric))

    def _forms(self, batch: TaskBatch) -> list[str]:
        """Return the forms that are possible, the one expected to be fastest first."""
        if self._vectorize is True:
            return [self._together]
        together = self._vectorize == "auto" and len(batch) > 1 and is_tensor_task(batch.example)
        if self._seeded and self._alone:
            together = False
        forms = [self._together, self._one_by_one] if together else [self._one_by_one]
        return [form for form in forms if form not in self.refused] or [self._one_by_one]

    def _turn(self, batch: TaskBatch) -> str:
        """Return the form for this meta-batch: each in turn while they are tried."""
        forms = self._forms(batch)
        if len(forms) == 1 or self._seeded:
            return forms[0]
        least = min(forms, key=lambda form: len(self._seconds.get(form, [])))
        if len(self._seconds.get(least, [])) < _TRIALS:
            return least
        medians = {form: statistics.median(self._seconds[form][1:]) for form in forms}
        fastest = min(forms, key=medians.__getitem__)
        found = ", ".join(f"{form} {1e3 * medians[form]:.3g} ms" for form in forms)
        log.info("a meta-batch took %s: keeping %s", found, fastest)
        self.refused.update(form for form in forms if form != fastest)
        return fastest

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
        if not self._check or key in self._checked or self._inner.scale is not None:
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


def refusal(error: Exception, batch: TaskBatch) -> Exception:
    """Return the error that says why tasks cannot run all at once and how to mend it."""
    if isinstance(error, KoiError):
        return error
    name, why = type(batch.example).__name__, reason_of(error)
    advice = advice_on(error, "use vectorize=False, or see the documentation on own tasks")
    return EngineError(f"the tasks {name} cannot run all at once ({why}): {advice}")
