"""The inner loop step by step, and what the algorithm asks of it.

Written once for one task and for many at once: a subclass says how the tensors that are stepped
come from φ and how a loss is computed on them. Where many tasks run at once every tensor has them
along a first dimension, the loss is a vector, and its sum has each task's gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koi.algorithms import given
from koi.errors import ModelError
from koi.inner.base import InnerLoop
from koi.inner.optimizers.bound import BoundOptimizer
from koi.inner.optimizers.clipping import clipped
from koi.phi.arithmetic import Tensors, clone
from koi.phi.outcome import Phi
from koi.phi.rates import StepRates
from koi.tasks import outer_view

_REENTRANT = (
    "the model uses torch.utils.checkpoint with use_reentrant=True, which gives no gradients to "
    "an inner loop: use use_reentrant=False"
)


class Adapted(NamedTuple):
    """Where the inner loop ended: φ̃, moments, a loss for each step, and what algorithms ask for.

    Args:
        params: φ̃.
        moments: the inner optimizer's.
        losses: at each inner step, before its update, and then the query loss, if there is one.
        last: what the last step saw of the task.
        path: the parameters before the first step and after each.
        gradient: of the query loss.
        rates: those that are learned, a row for each task where many run at once.
        gradient_of_rates: of the query loss, with respect to these.
    """

    params: Tensors
    moments: Tensors
    losses: Tensor
    last: Any = None
    path: Sequence[Tensors] = ()
    gradient: Sequence[Tensor] = ()
    rates: Sequence[Tensor] = ()
    gradient_of_rates: Sequence[Tensor] = ()


class Given(NamedTuple):
    """What the algorithm makes of a task, or of many, and what goes with it."""

    given: Tensors
    moments: Tensors
    losses: Tensor


def nothing() -> None:
    """Do nothing after an inner step."""


class StepwiseEngine(ABC):
    """Steps ``params`` in place, one inner step after another."""

    inner: InnerLoop
    params: Tensors
    optimizer: BoundOptimizer
    _ones: Tensor | None = None

    @abstractmethod
    def begin(self, phi: Phi) -> None:
        """Set the tensors that are stepped to φ."""

    @abstractmethod
    def loss(self, view: Any, step: int, params: Tensors | None = None) -> Tensor:
        """Return the loss at ``params`` (None: the tensors that are stepped), moving buffers."""

    def outer_loss(self, view: Any, step: int) -> Tensor:
        """Return the query loss at the tensors that were stepped, with a gradient for `params`."""
        return self.loss(view, step)

    @abstractmethod
    def buffers_kept(self) -> AbstractContextManager[None]:
        """Undo what a loss that is no inner step does to the module."""

    @abstractmethod
    def rows(self, tensors: Sequence[Tensor]) -> Tensors:
        """Return φ's tensors as those of the tasks that run at once."""

    @abstractmethod
    def each(self, function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        """Return ``function`` of φ and of tensors of one task, for all that run at once."""

    def run(self, phi: Phi, task: Any, steps: Iterable[Any], num_steps: int) -> Given | None:
        """Do what the algorithm does with one task, or with many stacked into one.

        None where the gradient of the query loss overflowed in float16, so that there is none.
        """
        algorithm = self.inner.algorithm
        if self.inner.through_steps:
            adapted = self._through_steps(phi, task, steps, num_steps)
        elif algorithm.query_gradient:
            adapted = self._first_order(phi, task, steps)
        else:
            adapted = self._along(phi, steps)
        if adapted is None:
            return None
        with torch.no_grad():
            give = self.each(partial(given, algorithm))
            of_learned, rates = self.inner.learned.those_learned, adapted.rates
            path = [[*of_learned(params), *rates] for params in adapted.path]
            gradient = of_learned(adapted.gradient) if adapted.gradient else []
            gradient += adapted.gradient_of_rates
            tensors = give(phi.learned, [*of_learned(adapted.params), *rates], path, gradient)
        return Given(tensors, adapted.moments, adapted.losses)

    def adapt_to(
        self,
        phi: Phi,
        steps: Iterable[Any],
        after_each: Callable[[], None] = nothing,
    ) -> Adapted:
        """Return φ̃, after an optimizer step on each view of the task."""
        self.begin(phi)
        self.optimizer.load(phi.moments)
        losses, view = [], None
        after_each()
        for step, view in enumerate(steps):
            loss = self.loss(view, step)
            # unnamed, so that the gradients are gone before the next step's
            self._step(self.inner_gradients(loss, self.params), self.rates_at(phi, step))
            losses.append(loss.detach())
            after_each()
        return Adapted(self.params, self.optimizer.moments(), self.stacked(losses), view)

    def rates_at(self, phi: Phi, step: int, learned: Sequence[Tensor] | None = None) -> StepRates:
        """Return what multiplies each parameter's rate at an inner step; None: 1.

        ``learned`` stands in the place of φ's learned rates.
        """
        factors = None if phi.rates is None else phi.rates[step]
        if self.inner.learned_rates is None:
            return factors
        values = phi.learned_rates if learned is None else learned
        return self.inner.learned_rates.at(values, step, factors, self.params)

    def _step(self, grads: tuple[Tensor | None, ...] | None, rates: StepRates) -> None:
        if grads is not None:
            self.optimizer.step(grads, rates)

    def _along(self, phi: Phi, steps: Iterable[Any]) -> Adapted:
        """Return φ̃, and the way there for an algorithm that looks at it."""
        if not self.inner.algorithm.trajectory:
            return self.adapt_to(phi, steps)
        path: list[Tensors] = []
        adapted = self.adapt_to(phi, steps, lambda: path.append(clone(self.params)))
        return adapted._replace(path=path)

    def _first_order(self, phi: Phi, task: Any, steps: Iterable[Any]) -> Adapted | None:
        """Return φ̃ and ∇L(φ̃) of the query loss, as if φ̃ did not depend on φ."""
        adapted = self._along(phi, steps)
        number = len(adapted.losses)
        with self.buffers_kept():  # until the gradient, which may need them as they were
            loss = self.outer_loss(outer_view(task, adapted.last), number)
            grads = self.gradients(loss, self.params)
        if grads is None:
            return None
        losses = torch.cat([adapted.losses, loss.detach().unsqueeze(0)])
        return adapted._replace(losses=losses, gradient=filled(grads, self.params))

    @abstractmethod
    def _through_steps(
        self, phi: Phi, task: Any, steps: Iterable[Any], num_steps: int
    ) -> Adapted | None:
        """Return φ̃ and dL(φ̃(φ))/dφ of the query loss, through every inner step."""

    def inner_gradients(
        self, loss: Tensor, params: Sequence[Tensor], create_graph: bool = False
    ) -> tuple[Tensor | None, ...] | None:
        """Return `gradients`, clipped, of what is adapted; None in the place of all others."""
        places, clip = self.inner.learned.adapted, self.inner.clip
        own = params if places is None else [params[i] for i in places]
        grads = self.gradients(loss, own, create_graph)
        if grads is None:
            return None
        if clip is not None:
            grads = clipped(grads, clip, stacked=loss.dim() > 0)
        if places is None:
            return grads
        of_adapted = dict(zip(places, grads, strict=True))
        return tuple(of_adapted.get(i) for i in range(len(params)))

    def gradients(
        self, loss: Tensor, params: Sequence[Tensor], create_graph: bool = False
    ) -> tuple[Tensor | None, ...] | None:
        """Return the gradients of the sum of ``loss``, None where a parameter is unused.

        None instead of them all where they overflowed in float16.

        Raises:
            ModelError: torch cannot differentiate the model as the algorithm needs.
        """
        ones, scale = self._ones, self.inner.scale
        if ones is None or ones.shape != loss.shape or ones.dtype is not loss.dtype:
            ones = self._ones = torch.ones_like(loss)
        try:
            grads = torch.autograd.grad(
                loss,
                params,
                ones if scale is None else ones * scale.factor,
                create_graph=create_graph,
                allow_unused=True,
            )
        except RuntimeError as error:
            explain(error, self.inner.algorithm.second_order)
            raise
        return grads if scale is None else scale.unscaled(grads)

    def stacked(self, losses: Tensors) -> Tensor:
        """Return the losses of the steps along a first dimension, which may be empty."""
        return torch.stack(losses) if losses else self.params[0].new_zeros(0)


def explain(error: RuntimeError, second_order: bool) -> None:
    """Say what to do where torch cannot give a gradient, if that is known.

    Raises:
        ModelError: it is.
    """
    text = str(error)
    if "use_reentrant=True" in text:
        raise ModelError(_REENTRANT) from error
    if "through the graph a second time" in text:
        raise ModelError(
            "the gradient of the loss goes through a graph that is gone: return the loss without "
            "calling backward(), which Koi does; and of what an earlier step or task has computed, "
            "such as a hidden state, use .detach()"
        ) from error
    if "modified by an inplace operation" in text:
        raise ModelError(
            f"the gradient of the loss needs a tensor that was changed in place since ({text}): "
            "make a new one, such as self.scale = 0.9 * self.scale in the place of "
            "self.scale.mul_(0.9), which MAML needs as it goes back through all inner steps"
        ) from error
    twice = "once_differentiable" in text or ("derivative" in text and "not implemented" in text)
    if second_order and twice:
        raise ModelError(
            f"the algorithm differentiates the gradient of the loss, and torch cannot ({text}): "
            "write that function in others, or use algorithm='fomaml' or 'reptile'"
        ) from error


def detached(tensors: Sequence[Tensor]) -> Tensors:
    """Return the tensors without the graph that led to them."""
    return [t.detach() for t in tensors]


def filled(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensors:
    """Return the gradients, zero where the loss did not use a parameter, dense where sparse."""
    return [
        torch.zeros_like(p) if g is None else g if g.layout is torch.strided else g.to_dense()
        for g, p in zip(grads, params, strict=True)
    ]
