"""Optimizers bound to the tensors that they step: of one task, or stacked of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from koi.inner.base import InnerLoop
from koi.inner.optimizers.moments import check_moments, spread
from koi.inner.optimizers.rules import UpdateRule
from koi.inner.optimizers.torch_optimizer import TorchOptimizer
from koi.phi.arithmetic import Tensors
from koi.phi.rates import StepRates


class BoundOptimizer(Protocol):
    """An optimizer bound to tensors that it steps in place, of one task or stacked of many."""

    def load(self, moments: Tensors | None) -> None:
        """Start from φ's moments, every task from the same; None: from a fresh optimizer's.

        Raises:
            ConfigurationError: they are another optimizer's, or of other parameters.
        """

    def step(self, grads: Sequence[Tensor | None], rates: StepRates = None) -> None:
        """Step by the gradients; None where the loss did not use a parameter.

        ``rates`` has for each parameter what multiplies its learning rate; None: 1.
        """

    def moments(self) -> Tensors:
        """Return the moments, stacked as the parameters are; later steps do not change them."""

    def per_task(self, moments: Tensors) -> list[bool]:
        """Return which of the moments are stacked, as all but step counts are."""


def bound_optimizer(
    inner: InnerLoop, params: Tensors, num_tasks: int | None = None
) -> BoundOptimizer:
    """Bind the inner optimizer's rule, or where it has none itself, to ``params``.

    Args:
        inner: the settings.
        params: the tensors to step.
        num_tasks: rows of the stacked tensors; None: the tensors are one task's.
    """
    if inner.rule is not None:
        return RuleOptimizer(inner.rule, params, num_tasks)
    return TorchOptimizer(inner, params, num_tasks)


class RuleOptimizer:
    """An update rule bound to the tensors that it steps in place."""

    def __init__(self, rule: UpdateRule, params: Tensors, num_tasks: int | None) -> None:
        self.rule = rule
        self.params = params
        self._values = [p.detach() for p in params]  # the same memory, stepped without autograd
        self._num_tasks = num_tasks
        self._shapes = rule.shapes(params if num_tasks is None else [p[0] for p in params])
        self._moments: Tensors = []

    def spread(self, moments: Tensors | None) -> Tensors:
        """Return the moments every task starts from."""
        if moments is None:
            return self.rule.initial(self.params)
        check_moments(moments, self._shapes)
        return spread(moments, self.per_task(moments), self._num_tasks)

    def load(self, moments: Tensors | None) -> None:
        """Start from φ's moments, or from the rule's initial ones."""
        self._moments = self.spread(moments)

    def step(self, grads: Sequence[Tensor | None], rates: StepRates = None) -> None:
        """Step by the gradients."""
        self._moments = self.rule.step_(grads, self._values, self._moments, rates)

    def moments(self) -> Tensors:
        """Return the moments; the rule never changes them in place."""
        return self._moments

    def per_task(self, moments: Tensors) -> list[bool]:
        """Return true for all but the scalars at the end."""
        return [i < self.rule.num_slots * len(self.params) for i in range(len(moments))]
