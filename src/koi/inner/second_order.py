"""The gradient of the query loss through all inner steps, in one of two ways.

With φ_0 = φ and φ_{j+1} = F_j(φ_j), optimizer's moments included, the gradient of L(φ_k) is λ_0 of
λ_k = ∇L(φ_k), λ_j = (dF_j/dφ_j)ᵀ λ_{j+1}. For a few steps torch keeps the graph of all of them and
goes back through it. For many, only φ_0 … φ_k are kept: each F_j is computed once more as λ goes
back, so that there is never more than the graph of one step (checkpoints at every step, as in Chen
et al., arXiv 1604.06174). Both give the same.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from koi.errors import ModelError
from koi.inner.base import InnerLoop
from koi.inner.optimizers.bound import RuleOptimizer
from koi.inner.optimizers.rules import UpdateRule
from koi.inner.stepwise import Adapted, StepwiseEngine, detached, explain, filled
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Phi
from koi.randomness import States, capture, restore, same_states
from koi.tasks import outer_view

log = logging.getLogger("koi")

# Inner steps times parameter tensors: with more, each step is computed once more on the way back.
MOST_IN_ONE_GRAPH = 64

_RECOMPUTED = (
    "the model recomputes or moves what it saves for the gradient (torch.utils.checkpoint, "
    "saved_tensors_hooks), which would see other weights than those of its inner step under a "
    "derivative of second order: switch that off (gradient_checkpointing_disable()), or use "
    "algorithm='fomaml'"
)


def goes_step_by_step(inner: InnerLoop, num_steps: int) -> bool:
    """Return whether the gradient goes back step by step; the scale of float16 cannot."""
    size = num_steps * len(inner.learned.params)
    return inner.algorithm.second_order and inner.scale is None and size > MOST_IN_ONE_GRAPH


class Before(NamedTuple):
    """What an inner step began with."""

    params: Tensors
    moments: Tensors
    buffers: Tensors
    view: Any
    draws: States


class SecondOrderEngine(StepwiseEngine):
    """Differentiates through the inner steps."""

    _is_said = False

    @abstractmethod
    def buffers_now(self) -> Tensors:
        """Return the buffers and constants as they are, not to be changed in place."""

    @abstractmethod
    def put_buffers(self, values: Tensors) -> None:
        """Let the buffers and constants have these values."""

    def can_repeat(self) -> bool:
        """Return whether steps can be computed once more: nothing but buffers was changed."""
        return True

    def _through_steps(
        self, phi: Phi, task: Any, steps: Iterable[Any], num_steps: int
    ) -> Adapted | None:
        """Return φ̃ and dL(φ̃(φ))/dφ of the query loss, through every inner step.

        Where an algorithm of first order has learned rates, the direction of each step counts as a
        constant: dL/dφ is ∇L(φ̃) then, and dL/dα_j is its product with that direction.
        """
        if not self.inner.algorithm.second_order:
            return self._in_one_graph(phi, task, steps)
        # of attention's kernels only the plain one can be differentiated twice
        with sdpa_kernel(SDPBackend.MATH), without_saved_tensors_hooks():
            if goes_step_by_step(self.inner, num_steps):
                if not self._is_said:
                    self._is_said = True
                    log.info(
                        "MAML goes back through %d inner steps step by step, in the memory of one",
                        num_steps,
                    )
                return self._step_by_step(phi, task, steps)
            return self._in_one_graph(phi, task, steps)

    def _in_one_graph(self, phi: Phi, task: Any, steps: Iterable[Any]) -> Adapted | None:
        values, moments = self._start(phi)
        leaves, rates = _leaves(values), _leaves(self.rows(phi.learned_rates))
        params: Tensors = list(leaves)
        losses: Tensors = []
        trajectory = self.inner.algorithm.trajectory
        first = not self.inner.algorithm.second_order
        path = [detached(params)] if trajectory else []
        view = None
        for step, view in enumerate(steps):
            loss = self.loss(view, step, params)
            grads = self.inner_gradients(loss, params, create_graph=not first)
            if grads is not None:
                now = self.rates_at(phi, step, rates)
                params, moments = self._rule.step(grads, params, moments, now, first_order=first)
            losses.append(loss.detach())
            if trajectory:
                path.append(detached(params))
        with self.buffers_kept():
            loss = self.loss(outer_view(task, view), len(losses), params)
            grads = self.gradients(loss, [*leaves, *rates])
        losses.append(loss.detach())
        if grads is None:
            return None
        gradient = filled(grads, [*leaves, *rates])
        return Adapted(
            detached(params),
            detached(moments),
            torch.stack(losses),
            path=path,
            gradient=gradient[: len(leaves)],
            rates=detached(rates),
            gradient_of_rates=gradient[len(leaves) :],
        )

    def _step_by_step(self, phi: Phi, task: Any, steps: Iterable[Any]) -> Adapted | None:
        params, moments = self._start(phi)
        kept: list[Before] = []
        losses: Tensors = []
        path = [detached(params)] if self.inner.algorithm.trajectory else []
        view = None
        for step, view in enumerate(steps):
            draws = capture()
            if kept and same_states(draws, kept[-1].draws):
                draws = kept[-1].draws  # which are larger than a small φ
            kept.append(Before(params, moments, self.buffers_now(), view, draws))
            leaves = _leaves(params)
            loss = self.loss(view, step, leaves)
            grads = self.inner_gradients(loss, leaves)
            assert grads is not None, "only float16 overflows"
            with torch.no_grad():
                now = self.rates_at(phi, step)
                params, moments = self._rule.step(grads, params, moments, now)
            losses.append(loss.detach())
            if self.inner.algorithm.trajectory:
                path.append(params)
        if not self.can_repeat():
            log.info("the model keeps more than buffers from step to step: MAML in one graph")
            restore(kept[0].draws)
            return self._in_one_graph(phi, task, [before.view for before in kept])
        with self.buffers_kept():
            leaves = _leaves(params)
            loss = self.loss(outer_view(task, view), len(losses), leaves)
            grads = self.gradients(loss, leaves)
        losses.append(loss.detach())
        assert grads is not None, "only float16 overflows"
        draws, buffers = capture(), self.buffers_now()
        rates = self.rows(phi.learned_rates)
        gradient, of_rates = self._back(phi, kept, filled(grads, leaves), rates)
        restore(draws)
        self.put_buffers(buffers)
        return Adapted(
            params,
            moments,
            torch.stack(losses),
            path=path,
            gradient=gradient,
            rates=rates,
            gradient_of_rates=of_rates,
        )

    def _back(
        self, phi: Phi, kept: list[Before], adjoint: Tensors, rates: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return λ_0 from λ_k, and dL/dα, letting go of what each step began with."""
        of_rates = [torch.zeros_like(rate) for rate in rates]
        count = self._rule.num_slots * len(adjoint)
        of_moments = [torch.zeros_like(m) for m in kept[0].moments[:count]] if kept else []
        draws = None
        for step in reversed(range(len(kept))):
            before = kept.pop()
            if before.draws is not draws:
                restore(draws := before.draws)
            self.put_buffers(before.buffers)
            params = _leaves(before.params)
            own, counts = _leaves(before.moments[:count]), before.moments[count:]
            loss = self.loss(before.view, step, params)
            grads = self.inner_gradients(loss, params, create_graph=True)
            assert grads is not None, "only float16 overflows"
            learned = _leaves(rates)
            now = self.rates_at(phi, step, learned)
            after, moments = self._rule.step(grads, params, [*own, *counts], now)
            outputs, given = [*after, *moments[:count]], [*adjoint, *of_moments]
            found = _pulled_back(outputs, [*params, *own, *learned], given)
            adjoint, of_moments = found[: len(params)], found[len(params) :][:count]
            for total, part in zip(of_rates, found[len(params) + count :], strict=True):
                total += part
        return adjoint, of_rates

    @property
    def _rule(self) -> UpdateRule:
        assert isinstance(self.optimizer, RuleOptimizer), "checked when the learner is made"
        return self.optimizer.rule

    def _start(self, phi: Phi) -> tuple[Tensors, Tensors]:
        """Return φ, what adapts in memory of its own, and the moments."""
        self.begin(phi)
        adapted = set(self.inner.learned.those_adapted(range(len(self.params))))
        values = [p.detach() for p in self.params]
        params = [v.clone() if i in adapted else v.view_as(v) for i, v in enumerate(values)]
        assert isinstance(self.optimizer, RuleOptimizer), "checked when the learner is made"
        return params, self.optimizer.spread(phi.moments)


@contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Refuse what recomputes activations: by then another inner step's weights are in place."""
    try:
        with disable_saved_tensors_hooks(_RECOMPUTED):
            yield
    except RuntimeError as error:
        if str(error) == _RECOMPUTED:
            raise ModelError(_RECOMPUTED) from error
        raise


def _leaves(tensors: Tensors) -> Tensors:
    return [t.detach().requires_grad_() for t in tensors]


def _pulled_back(after: Tensors, before: Tensors, adjoint: Tensors) -> Tensors:
    """Return the adjoint of what a step began with, from that of what came of it."""
    pairs = [(t, a) for t, a in zip(after, adjoint, strict=True) if t.requires_grad]
    outputs, given = [t for t, _ in pairs], [a for _, a in pairs]
    try:
        grads = torch.autograd.grad(outputs, before, given, allow_unused=True)
    except RuntimeError as error:
        explain(error, second_order=True)
        raise
    return filled(grads, before)
