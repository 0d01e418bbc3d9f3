"""The inner loop step by step, and what each algorithm makes of it.

Written once for one task and for many at once: a subclass says how the tensors that are stepped
come from φ and how a loss is computed on them. Where many tasks run at once every tensor has them
along a first dimension, the loss is a vector, and its sum has each task's gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from koi.inner.base import InnerLoop
from koi.inner.bound import BoundOptimizer, RuleOptimizer
from koi.inner.internals import run_backward
from koi.parameters import Tensors
from koi.state import Phi
from koi.tasks import outer_view


class Adapted(NamedTuple):
    """What the inner loop gives: φ̃ or the meta-gradient, buffers, moments, a loss for each step."""

    params: Tensors
    buffers: Tensors
    moments: Tensors
    losses: Tensor


def nothing() -> None:
    """Do nothing after an inner step."""


class StepwiseEngine(ABC):
    """Steps ``params`` in place, one inner step after another."""

    inner: InnerLoop
    params: Tensors
    buffers: Tensors
    optimizer: BoundOptimizer
    _ones: Tensor | None = None

    @abstractmethod
    def begin(self, phi: Phi) -> None:
        """Set the tensors that are stepped to φ."""

    @abstractmethod
    def loss(self, view: Any, step: int, params: Tensors | None = None) -> Tensor:
        """Return the loss at ``params`` (None: the tensors that are stepped), moving buffers."""

    @contextmanager
    @abstractmethod
    def buffers_kept(self) -> Iterator[None]:
        """Undo what a loss that is no inner step does to the buffers."""

    def run(self, phi: Phi, task: Any, steps: Sequence[Any]) -> Adapted:
        """Do what the algorithm does with one task, or with many stacked into one."""
        if self.inner.algorithm == "reptile":
            return self.adapt_to(phi, steps)
        if self.inner.algorithm == "fomaml":
            return self._first_order(phi, task, steps)
        return self._second_order(phi, task, steps)

    def adapt_to(
        self,
        phi: Phi,
        steps: Sequence[Any],
        after_each: Callable[[], None] = nothing,
    ) -> Adapted:
        """Reptile: φ̃ after an optimizer step on each view of the task (algorithm 1)."""
        self.begin(phi)
        self.optimizer.load(phi.moments)
        losses = []
        after_each()
        for step, view in enumerate(steps):
            loss = self.loss(view, step)
            # unnamed, so that the gradients are gone before the next step's
            self.optimizer.step(self.gradients(loss, self.params))
            losses.append(loss.detach())
            after_each()
        return Adapted(self.params, self.buffers, self.optimizer.moments(), self.stacked(losses))

    def _first_order(self, phi: Phi, task: Any, steps: Sequence[Any]) -> Adapted:
        """FOMAML: ∇L(φ̃) of the query loss, as if φ̃ did not depend on φ (section 2.2)."""
        adapted = self.adapt_to(phi, steps)
        with self.buffers_kept():  # until the gradient, which may need them as they were
            loss = self.loss(outer_view(task, steps), len(steps))
            grads = self.gradients(loss, self.params)
        losses = torch.cat([adapted.losses, loss.detach().unsqueeze(0)])
        return Adapted(filled(grads, self.params), self.buffers, adapted.moments, losses)

    def _second_order(self, phi: Phi, task: Any, steps: Sequence[Any]) -> Adapted:
        """MAML: dL(φ̃(φ))/dφ through every inner step (Finn et al., arXiv 1703.03400, eq. 1)."""
        assert isinstance(self.optimizer, RuleOptimizer), "checked when the learner is made"
        rule = self.optimizer.rule
        self.begin(phi)
        leaves = [p.detach().clone().requires_grad_() for p in self.params]
        params: Tensors = list(leaves)
        moments = self.optimizer.spread(phi.moments)
        losses = []
        # of attention's kernels only the plain one can be differentiated twice
        with sdpa_kernel(SDPBackend.MATH):
            for step, view in enumerate(steps):
                loss = self.loss(view, step, params)
                grads = self.gradients(loss, params, create_graph=True)
                params, moments = rule.step(grads, params, moments)
                losses.append(loss.detach())
        with self.buffers_kept():
            loss = self.loss(outer_view(task, steps), len(steps), params)
            grads = self.gradients(loss, leaves)
        losses.append(loss.detach())
        moments = [m.detach() for m in moments]
        return Adapted(filled(grads, leaves), self.buffers, moments, torch.stack(losses))

    def gradients(
        self, loss: Tensor, params: Sequence[Tensor], create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the sum of ``loss``, None where a parameter is unused.

        This is ``torch.autograd.grad`` without its inspection of the arguments, which takes a
        small network a tenth of the inner loop.
        """
        ones = self._ones
        if ones is None or ones.shape != loss.shape or ones.dtype is not loss.dtype:
            ones = self._ones = torch.ones_like(loss)
        if self.inner.scale is not None:
            ones = ones * self.inner.scale.factor
        grads: tuple[Tensor | None, ...] = run_backward(
            (loss,),
            (ones,),
            create_graph,  # keep the graph
            create_graph,
            tuple(params),
            True,  # a parameter may be unused
            accumulate_grad=False,
        )
        if self.inner.scale is not None:
            return self.inner.scale.unscaled(grads, loss.shape[0] if loss.dim() else None)
        return grads

    def stacked(self, losses: Tensors) -> Tensor:
        """Return the losses of the steps along a first dimension, which may be empty."""
        return torch.stack(losses) if losses else self.params[0].new_zeros(0)


def filled(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensors:
    """Return the gradients, zero where the loss did not use a parameter, dense where sparse."""
    return [
        torch.zeros_like(p) if g is None else g if g.layout is torch.strided else g.to_dense()
        for g, p in zip(grads, params, strict=True)
    ]
