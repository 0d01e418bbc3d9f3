"""Which engine runs: all tasks at once where that is possible and pays, else one by one."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from koi.errors import EngineError, KoiError, NonFiniteError
from koi.inner.base import Engine, InnerLoop, Metric, advice_on, reason_of
from koi.inner.compiled import CompiledEngine
from koi.inner.eager import EagerEngine
from koi.inner.vectorized import VectorizedEngine
from koi.parameters import Tensors
from koi.randomness import Place, capture, restore
from koi.state import Outcome, Phi
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
    once wherever possible.
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
    ) -> None:
        self._vectorize = vectorize
        self._together = "vectorized+compiled" if compile else "vectorized"
        self._one_by_one = "compiled" if compile else "eager"
        self._compile = compile
        self._seeded = seeded
        self._make: dict[str, Callable[[], Engine]] = {
            "eager": lambda: EagerEngine(model, inner),
            "vectorized": lambda: VectorizedEngine(model, inner, chunk_size),
            "compiled": lambda: CompiledEngine(
                model, inner, mode=compile, together=False, chunk_size=chunk_size
            ),
            "vectorized+compiled": lambda: CompiledEngine(
                model, inner, mode=compile, together=True, chunk_size=chunk_size
            ),
        }
        self._engines: dict[str, Engine] = {}
        self.refused: set[str] = set()
        self._seconds: dict[str, list[float]] = {}
        self.name = "none yet"

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task of the batch."""
        form = self._turn(batch)
        began = time.perf_counter()
        form, outcome = self._run(form, batch, lambda e: e.meta_batch(phi, batch, num_steps, place))
        if len(self._seconds.setdefault(form, [])) < _TRIALS:
            self._seconds[form].append(time.perf_counter() - began)
        self.name = form
        return outcome

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step."""
        form = self._forms(batch)[0]
        return self._run(form, batch, lambda e: e.evaluate(phi, batch, num_steps, place))[1]

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        form = self._forms(batch)[0]
        return self._run(form, batch, lambda e: e.measure(phi, batch, num_steps, place, metric))[1]

    def _forms(self, batch: TaskBatch) -> list[str]:
        """Return the forms that are possible, the one expected to be fastest first."""
        if self._vectorize is True:
            return [self._together]
        together = self._vectorize == "auto" and len(batch) > 1 and is_tensor_task(batch.example)
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

    def _run(
        self, form: str, batch: TaskBatch, work: Callable[[Engine], Result]
    ) -> tuple[str, Result]:
        """Do the work in the given form, or one by one where that proves impossible."""
        proved = form in self._engines
        states = capture() if not proved else None
        try:
            if not proved:
                engine = self._make[form]()
            result = work(self._engines[form] if proved else engine)
        except NonFiniteError:
            raise
        except Exception as error:
            if form == self._one_by_one or (proved and not isinstance(error, EngineError)):
                raise
            if self._vectorize is True:
                raise refusal(error, batch) from error
            log.warning("%s; running one task at a time", refusal(error, batch))
            self.refused.add(form)
            if states is not None:
                restore(states)
            return self._run(self._one_by_one, batch, work)
        if not proved:
            self._engines[form] = engine
        return form, result


def refusal(error: Exception, batch: TaskBatch) -> Exception:
    """Return the error that says why tasks cannot run all at once and how to mend it."""
    if isinstance(error, KoiError):
        return error
    name, why = type(batch.example).__name__, reason_of(error)
    advice = advice_on(error, "use vectorize=False, or see the documentation on own tasks")
    return EngineError(f"the tasks {name} cannot run all at once ({why}): {advice}")
