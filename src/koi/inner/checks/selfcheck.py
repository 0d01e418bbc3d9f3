"""Koi checks an engine on the user's own first tasks, against the plainest way there is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from koi.algorithms import MAML
from koi.errors import EngineError, ModelError
from koi.inner.base import Engine, InnerLoop
from koi.inner.checks.differences import Losses
from koi.inner.checks.plain import Plain
from koi.inner.eager import EagerEngine
from koi.inner.optimizers.hooks import step_hooks
from koi.inner.optimizers.rules import make_optimizer
from koi.phi.arithmetic import Tensors, clone, difference, largest
from koi.phi.outcome import Phi
from koi.randomness import Place, States, capture, restore
from koi.tasks import TaskBatch

# Two right ways may differ by so many units of the parameters' precision, or such a part of a
# movement, and by so many times what a change of φ's last digit becomes in the inner loop.
_ROUNDING = 2000
_PART = 1e-10
_AMPLIFIED = 100
# Changes of φ, in units of its precision. There are many of the largest, since each crosses a kink
# that rounding alone may cross, such as that of a ReLU, in one of two cases.
_CHANGES = (1, 1, 10, *[100] * 7)
# Where draws cannot be repeated one for one: so many times what other draws change.
_NOISE = 5


class DisagreementError(EngineError):
    """An engine that gives something else than the plainest way."""


class Request(NamedTuple):
    """What an engine is asked for.

    Args:
        form: the engine's name.
        purpose: "train", "evaluate" or "measure".
        phi: where the tasks start.
        batch: the tasks.
        num_steps: inner steps.
        place: where this is.
    """

    form: str
    purpose: str
    phi: Phi
    batch: TaskBatch
    num_steps: int
    place: Place


# From the parameters to begin with, a task and its number to what it gives, and its last loss.
Way = Callable[[Sequence[Tensor], Any, int], tuple[Tensors, float]]


class Eagerly:
    """Second order one task at a time: where torch's autograd is right, it is the plain way."""

    def __init__(self, model: nn.Module, inner: InnerLoop, request: Request) -> None:
        self._engine, self._request = EagerEngine(model, inner), request

    def __call__(self, start: Sequence[Tensor], task: Any, number: int) -> tuple[Tensors, float]:
        """Return what the algorithm gives of the task, and the query loss."""
        phi, count = self._request.phi, len(self._request.phi.params)
        own = list(start[:count]), phi.buffers, phi.constants, None, phi.names, phi.rates
        at = Phi(*own, list(start[count:]))
        batch = TaskBatch(tasks=[task], first=number)
        outcome = self._engine.meta_batch(at, batch, self._request.num_steps, self._request.place)
        return outcome.given, outcome.losses[0][-1] if outcome.losses else math.nan


@runtime_checkable
class Compiled(Protocol):
    """An engine that draws as torch does only where it is not compiled."""

    def uncompiled(self) -> Engine:
        """Return the engine without the compiler."""


class SelfCheck:
    """Compares an engine with `koi.inner.checks.plain` on one or two tasks, beyond rounding.

    Nothing is drawn from the user's generators, φ is left alone, and the tasks are copies; those
    that cannot be copied are not compared. Of rounding as much is allowed as a change of φ's last
    digit makes in the plain way. Second order is compared with that of one task at a time, and
    MAML's gradient with differences of the loss.

    Args:
        model: the user's module.
        inner: the settings of the inner loop.
        engine: what is compared.
        request: what it is asked for; the first two tasks are taken.
        rows: how many tasks a call of the engine is for.
    """

    def __init__(
        self, model: nn.Module, inner: InnerLoop, engine: Engine, request: Request, rows: int
    ) -> None:
        self._model, self._inner, self._engine = model, inner, engine
        self._request, self._rows = request, rows
        self._second_order = request.purpose == "train" and inner.algorithm.second_order
        self._together = request.form.startswith("vectorized")
        self._plain = Plain(
            *(model, inner, request.purpose, request.num_steps, request.place),
            *(request.phi.rates, self._together),
        )
        self._reference: Way = self._plain

    def run(self) -> None:
        """Compare.

        Raises:
            DisagreementError: naming the parameters that differ.
            ModelError: the loss reaches the module that the user gave.
        """
        states = capture()
        try:
            tasks = self._copies(self._request.batch.tasks[:2])
            if tasks and self._request.num_steps > 0 and not self._is_watched():
                self._look(tasks, states)
        finally:
            restore(states)

    def _is_watched(self) -> bool:
        """Return whether the optimizer's steps have effects of the user's, such as hooks."""
        params = [p.detach().clone().requires_grad_() for p in self._request.phi.params]
        optimizer = make_optimizer(self._inner.factory, params, self._inner.step_size)
        return any(step_hooks(optimizer)) or "step" in vars(optimizer)

    def _look(self, tasks: list[Any], states: States) -> None:
        start = self._start
        try:
            expected, loss = self._plainly(start, tasks, states)
        except ModelError:
            raise
        except Exception:  # the engine meets it too, and says where
            return
        if self._plain.noisy and self._together:  # a single task's draws can be repeated
            tasks, self._rows = tasks[:1], 1
            expected, loss = self._plainly(start, tasks, states)
        elif self._second_order and self._request.form != "eager":
            self._reference = Eagerly(self._model, self._inner, self._request)
            expected, loss = self._plainly(start, tasks, states)
        if self._plain.noisy and isinstance(self._engine, Compiled):
            self._engine = self._engine.uncompiled()
        if not torch.tensor(loss).isfinite() or not all(e.isfinite().all() for e in expected):
            return
        restore(states)
        given = self._given(self._copies(tasks))
        if not given:  # all tasks were skipped, which will be told
            return
        wrong = self._beyond_rounding(given, expected, tasks, states) if expected else []
        # another algorithm need not give the gradient as it is
        if self._second_order and type(self._inner.algorithm).gives is MAML.gives and not wrong:
            learned = self._request.phi.learned
            loss_of = Losses(self._plainly_from, self._plain, learned, tasks, states)
            wrong = loss_of.contradict(given)
        if wrong:
            names = [self._names()[i] for i in wrong]
            shown = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
            raise DisagreementError(
                f"the engine {self._request.form!r} does not give for {type(tasks[0]).__name__} "
                f"what the plainest loop gives: {shown} differ"
            )

    def _names(self) -> Sequence[str]:
        """Return what each tensor that is compared is called."""
        names = self._inner.learned
        every = {"evaluate": ["the query losses"], "measure": names.params}
        rates = [f"the rate of {name}" for name in names.those_adapted(names.params)]
        learned = [*names.those_learned(names.params), *rates]
        return every.get(self._request.purpose) or learned

    def _plainly_from(self, learned: Tensors, *others: Any) -> tuple[Tensors, float]:
        """Return `_plainly` from other values of what is learned."""
        phi = self._request.phi
        new = dict(zip(map(id, phi.learned), learned, strict=True))
        return self._plainly([new.get(id(p), p) for p in self._start], *others)

    @property
    def _start(self) -> Tensors:
        """The parameters and the learned rates that every task begins with."""
        return [*self._request.phi.params, *self._request.phi.learned_rates]

    def _given(self, tasks: list[Any]) -> Tensors:
        """Return what the engine gives, the first task filling it up."""
        request, phi = self._request, self._request.phi
        # copies, since a loss that changes a weight in place does so here where nothing is compiled
        params, buffers, constants = map(clone, (phi.params, phi.buffers, phi.constants))
        fresh = Phi(params, buffers, constants, None, phi.names, phi.rates, phi.learned_rates)
        weights = None if request.batch.weights is None else [1.0] * len(tasks)
        batch = TaskBatch(tasks=tasks, weights=weights).filled(self._rows)
        where = batch, request.num_steps, request.place
        if request.purpose == "train":
            return self._engine.meta_batch(fresh, *where).given
        if request.purpose == "evaluate":
            return [self._engine.evaluate(fresh, *where).mean(0)]
        values = self._engine.measure(fresh, *where, self._parameters)
        if not values:
            return []
        parts = torch.stack(values).mean(0).split([p.numel() for p in phi.params])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, phi.params, strict=True)]

    def _parameters(self, model: nn.Module, _: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._inner.learned.params_of(model)])

    def _plainly(
        self,
        start: Sequence[Tensor],
        tasks: list[Any],
        states: States,
        plain: Way | None = None,
    ) -> tuple[Tensors, float]:
        """Return the plain results' mean, the first task counting as often as it fills up."""
        plain = plain or self._reference
        restore(states)
        repeated = max(self._rows, len(tasks)) - len(tasks) + 1
        weights = [repeated] + [1] * (len(tasks) - 1)
        results = [plain(start, task, number) for number, task in enumerate(self._copies(tasks))]
        if self._plain.draws:  # at another number the first task has other minibatches
            results += [
                plain(start, self._copies(tasks)[0], number)
                for number in range(len(tasks), self._rows)
            ]
            weights = [1] * len(results)
        total = sum(weights)
        means = [
            sum((w / total) * t for w, t in zip(weights, tensors, strict=True))
            for tensors in zip(*(tensors for tensors, _ in results), strict=True)
        ]
        return means, sum(w / total * loss for w, (_, loss) in zip(weights, results, strict=True))

    def _beyond_rounding(
        self, given: Tensors, expected: Tensors, tasks: list[Any], states: States
    ) -> list[int]:
        """Return which tensors differ by more than rounding, or than other draws, explain."""
        start = self._start
        moved = self._moved(start, expected)
        away = [largest(a - b) for a, b in zip(given, expected, strict=True)]
        eps = max(torch.finfo(p.dtype).eps for p in start)
        allowed = [
            max(_ROUNDING * eps, _PART) * largest(m) + 10 * eps * largest(e)
            for m, e in zip(moved, expected, strict=True)
        ]
        unit = torch.finfo(self._inner.autocast).eps if self._inner.autocast else eps
        for attempt, size in enumerate(_CHANGES):
            wrong = [i for i in range(len(away)) if not away[i] <= allowed[i]]
            if not wrong:
                return []
            other, _ = self._plainly(perturbed(start, size * unit, attempt), tasks, states)
            for i, (a, b) in enumerate(zip(other, expected, strict=True)):
                allowed[i] = max(allowed[i], _AMPLIFIED * largest(a - b))
        if self._plain.noisy:
            torch.manual_seed(0)  # put back by `run`
            other = self._plain(start, self._copies(tasks)[0], 1)[0]
            for i, (a, b) in enumerate(zip(other, expected, strict=True)):
                allowed[i] = max(allowed[i], _NOISE * largest(a - b))
        return [i for i in range(len(away)) if not away[i] <= allowed[i]]

    def _moved(self, start: Tensors, expected: Tensors) -> Tensors:
        """Return what of the results is not φ itself, of which a part may be wrong."""
        if self._request.purpose == "evaluate":
            return expected
        count = len(self._request.phi.params)
        if self._request.purpose == "measure":
            return difference(expected, start[:count])
        with torch.no_grad():
            learned = [*self._inner.learned.those_learned(start[:count]), *start[count:]]
            return self._inner.algorithm.meta_gradient(learned, expected)

    def _copies(self, tasks: list[Any]) -> list[Any]:
        """Return copies that share the user's module; none where a task cannot be copied."""
        shared: dict[int, Any] = {id(part): part for part in self._model.modules()}
        shared |= {id(p): p for p in self._model.parameters()}
        try:
            copies: list[Any] = copy.deepcopy(tasks, shared)
        except Exception:  # whatever the user's own class raises
            return []
        return copies


def perturbed(tensors: Sequence[Tensor], unit: float, attempt: int) -> Tensors:
    """Return tensors with relative changes of up to ``unit``, from a generator of their own."""
    generator = torch.Generator().manual_seed(attempt)
    return [
        t * (1 + unit * (2 * torch.rand(t.shape, generator=generator) - 1).to(t)) for t in tensors
    ]
