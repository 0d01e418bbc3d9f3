"""Optimizers bound to the tensors that they step: of one task, or stacked of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from koi.errors import ConfigurationError
from koi.inner.base import InnerLoop
from koi.inner.optimizers import OptimizerFactory, UpdateRule, make_optimizer
from koi.parameters import Tensors


class BoundOptimizer(Protocol):
    """An optimizer bound to tensors that it steps in place, of one task or stacked of many."""

    def load(self, moments: Tensors | None) -> None:
        """Start from φ's moments, every task from the same; None: from a fresh optimizer's."""

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Step by the gradients; None where the loss did not use a parameter."""

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
    return TorchOptimizer(inner.factory, params, inner.step_size, num_tasks)


class RuleOptimizer:
    """An update rule bound to the tensors that it steps in place."""

    def __init__(self, rule: UpdateRule, params: Tensors, num_tasks: int | None) -> None:
        self.rule = rule
        self.params = params
        self._values = [p.detach() for p in params]  # the same memory, stepped without autograd
        self._num_tasks = num_tasks
        self._moments: Tensors = []

    def spread(self, moments: Tensors | None) -> Tensors:
        """Return the moments every task starts from."""
        if moments is None:
            return self.rule.initial(self.params)
        return spread(moments, self.per_task(moments), self._num_tasks)

    def load(self, moments: Tensors | None) -> None:
        """Start from φ's moments, or from the rule's initial ones."""
        self._moments = self.spread(moments)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Step by the gradients."""
        self._moments = self.rule.step_(grads, self._values, self._moments)

    def moments(self) -> Tensors:
        """Return the moments; the rule never changes them in place."""
        return self._moments

    def per_task(self, moments: Tensors) -> list[bool]:
        """Return true for all but the scalars at the end."""
        return [i < self.rule.num_slots * len(self.params) for i in range(len(moments))]


def spread(moments: Tensors, per_task: list[bool], num_tasks: int | None) -> Tensors:
    """Return φ's moments with a row for each task where they are per task."""
    if num_tasks is None:
        return moments
    return [
        m.expand(num_tasks, *m.shape) if rows else m
        for m, rows in zip(moments, per_task, strict=True)
    ]


class Slot(NamedTuple):
    """Where one moment stands in the state of a torch.optim optimizer, and its type there."""

    param: int
    name: str
    kind: type
    per_task: bool


class TorchOptimizer:
    """A ``torch.optim`` optimizer bound to tensors that stay the same, its moments as a list.

    The list ends with a number for each parameter, 0 as long as no step has used it: the optimizer
    keeps nothing of such a parameter, and begins it in its own way when a step does.
    """

    def __init__(
        self, factory: OptimizerFactory, params: Tensors, lr: float, num_tasks: int | None = None
    ) -> None:
        self.params = params
        self._num_tasks = num_tasks
        self._optimizer = make_optimizer(factory, params, lr)
        self._initial = self._export()
        self._slots, self._zeros = self._zeros_after_a_step(factory, lr)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Step by the gradients."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self._optimizer.step()
        for param in self.params:
            param.grad = None

    def load(self, moments: Tensors | None) -> None:
        """Start from copies of φ's moments, or from those of a fresh optimizer."""
        if moments is None:
            entries = list(zip(*self._initial, strict=True))
        else:
            values = spread(moments, self.per_task(moments), self._num_tasks)
            used = values[len(self._slots) :]
            pairs = zip(self._slots, values, strict=False)
            entries = [(slot, value) for slot, value in pairs if used[slot.param] > 0]
        self._optimizer.state.clear()
        for slot, value in entries:
            state = self._optimizer.state[self.params[slot.param]]
            state[slot.name] = value.clone() if slot.kind is Tensor else slot.kind(value.item())

    def moments(self) -> Tensors:
        """Return copies of the moments, zero for parameters that no step has used yet."""
        entries = dict(zip(*self._export(), strict=True))
        used = {slot.param for slot in entries}
        values = [
            entries.get(slot, zero) for slot, zero in zip(self._slots, self._zeros, strict=True)
        ]
        return values + [torch.tensor(float(i in used)) for i in range(len(self.params))]

    def per_task(self, moments: Tensors) -> list[bool]:
        """Return true for those in the shape of the stacked parameters."""
        flags = [slot.per_task for slot in self._slots]
        return flags + [False] * (len(moments) - len(flags))

    def _zeros_after_a_step(
        self, factory: OptimizerFactory, lr: float
    ) -> tuple[list[Slot], Tensors]:
        """Learn what the optimizer will keep, by a step on copies; return it with zeros for it."""
        copies = [p.detach().clone().requires_grad_() for p in self.params]
        trial = object.__new__(TorchOptimizer)
        trial.params, trial._num_tasks = copies, self._num_tasks
        trial._optimizer = make_optimizer(factory, copies, lr)
        trial.step([torch.zeros_like(p) for p in copies])
        slots, values = trial._export()
        return slots, [torch.zeros_like(value) for value in values]

    def _export(self) -> tuple[list[Slot], Tensors]:
        slots, values = [], []
        for index, param in enumerate(self.params):
            for name, value in sorted(self._optimizer.state.get(param, {}).items()):
                if value is None:
                    continue
                if not isinstance(value, Tensor | bool | int | float):
                    raise ConfigurationError(
                        [
                            f"inner_optimizer keeps a {type(value).__name__} ({name!r}) between "
                            "steps: Koi can carry tensors and numbers only"
                        ]
                    )
                tensor = torch.as_tensor(value).detach().clone()
                shaped = tensor.shape == param.shape and self._num_tasks is not None
                kind = Tensor if isinstance(value, Tensor) else type(value)
                slots.append(Slot(index, name, kind, shaped))
                values.append(tensor)
        return slots, values
