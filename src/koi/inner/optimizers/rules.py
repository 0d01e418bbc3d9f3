"""The optimizers of the inner loop.

SGD, Adam and AdamW are written out as pure update rules: lists of tensors in, lists of tensors
out. So they can be differentiated through (MAML), traced into one graph with the loss, and applied
to the stacked parameters of many tasks at once, since they work element by element. Any other
``torch.optim`` class steps as itself (`TorchOptimizer`).

What an optimizer carries from step to step (momentum, Adam's moments, step counts) is a flat list
of tensors, the *moments*: each has the shape of a parameter or is a scalar.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koi.errors import ConfigurationError
from koi.phi.arithmetic import Tensors
from koi.phi.rates import StepRates

OptimizerFactory = Callable[[Any, float], torch.optim.Optimizer]

FACTORIES: dict[str, OptimizerFactory] = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr),
}


class UpdateRule(ABC):
    """A pure, element-wise optimizer: the same on one task's tensors and on many tasks' stacked.

    ``only`` says which of the parameters the optimizer was given, by their places; None: all. The
    others never move: whatever gradient they have counts as none.
    """

    only: frozenset[int] | None

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """How many moments each parameter has; a vector with a count for each comes last."""

    @abstractmethod
    def initial(self, params: Sequence[Tensor]) -> Tensors:
        """Return the moments before the first step."""

    @abstractmethod
    def changes(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Return what to add to the parameters, and the next moments."""

    def shapes(self, params: Sequence[Tensor]) -> list[torch.Size]:
        """Return the shape of each moment of one task's parameters."""
        without_data = [torch.empty_like(p, device="meta") for p in params]
        return [moment.shape for moment in self.initial(without_data)]

    def carried(
        self, moments: Tensors, before: Sequence[Tensor], params: Sequence[Tensor]
    ) -> Tensors:
        """Return the moments of ``params``: those they had ``before``, fresh where they are new."""
        fresh = self.initial(params)
        places = {id(param): place for place, param in enumerate(before)}
        counts = slice(self.num_slots * len(params), None), slice(-1, None)
        for i, param in enumerate(params):
            place = places.get(id(param))
            if place is None:
                continue
            for slot in range(self.num_slots):
                fresh[slot * len(params) + i] = moments[slot * len(before) + place]
            for count, old in zip(fresh[counts[0]], moments[counts[1]], strict=False):
                count[i] = old[place]
        return fresh

    def dense(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gradients, those that are sparse (of ``Embedding(sparse=True)``) as dense."""
        return [g.to_dense() if g.is_sparse else g for g in grads]

    def step_(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        moments: Tensors,
        rates: StepRates = None,
    ) -> Tensors:
        """Step the parameters in place, with `step`'s arguments, and return the next moments."""
        used, changes, moments = self._partial_changes(grads, params, moments, rates)
        if used:
            torch._foreach_add_([params[i] for i in used], changes)
        return moments

    def step(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        moments: Tensors,
        rates: StepRates = None,
        *,
        first_order: bool = False,
    ) -> tuple[Tensors, Tensors]:
        """Return the parameters after the step, new tensors, and the next moments.

        Args:
            grads: the gradients; None where the loss did not use a parameter.
            params: the parameters.
            moments: theirs.
            rates: for each parameter what its change is multiplied by; None: 1.
            first_order: let derivatives take the direction of the step for a constant.
        """
        seen: Sequence[Tensor] = params
        if first_order:
            grads = [None if g is None else g.detach() for g in grads]
            seen, moments = [p.detach() for p in params], [m.detach() for m in moments]
        used, changes, moments = self._partial_changes(grads, seen, moments, rates)
        following = list(params)
        for i, change in zip(used, changes, strict=True):
            following[i] = params[i] + change
        return following, moments

    def _partial_changes(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        moments: Tensors,
        rates: StepRates,
    ) -> tuple[list[int], Tensors, Tensors]:
        """Return which parameters have a gradient, their changes, and all next moments.

        A parameter that the loss did not use, or that the optimizer was not given, keeps its value
        and its moments, as in torch.optim.
        """
        size, only = len(params), self.only
        pairs = [
            (i, grad)
            for i, grad in enumerate(grads)
            if grad is not None and (only is None or i in only)
        ]
        used, given = [i for i, _ in pairs], self.dense([grad for _, grad in pairs])
        if not used:
            return used, [], moments
        if rates is not None:
            used_rates: list[Any] = [rates[i] for i in used]  # what is stepped has a rate
            plain = self._partial_changes(grads, params, moments, None)
            return used, list(torch._foreach_mul(plain[1], used_rates)), plain[2]
        if len(used) == size:
            return used, *self.changes(given, params, moments)
        places = [slot * size + i for slot in range(self.num_slots) for i in used]
        counts = moments[self.num_slots * size :]
        own = [moments[i] for i in places] + [count[used] for count in counts]
        changes, new = self.changes(given, [params[i] for i in used], own)
        following = list(moments)
        for place, value in zip(places, new[: len(places)], strict=True):
            following[place] = value
        if counts:
            rows = torch.tensor(used, device=counts[0].device)
            following[-1] = counts[0].index_copy(0, rows, new[-1])
        return used, changes, following


@dataclass(frozen=True)
class SGD(UpdateRule):
    """θ ← θ − η g; with momentum μ: b ← μ b + g, θ ← θ − η b (Nesterov: θ ← θ − η (g + μ b)).

    The same steps as ``torch.optim.SGD``; weight decay λ adds λθ to g.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    only: frozenset[int] | None = None

    @property
    def num_slots(self) -> int:
        """One velocity with momentum, else nothing."""
        return 1 if self.momentum else 0

    def initial(self, params: Sequence[Tensor]) -> Tensors:
        """Return zero velocities; nothing without momentum."""
        return [torch.zeros_like(p) for p in params] if self.momentum else []

    def changes(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Return −η times the gradient or velocity, and the velocities."""
        steps = tuple(grads)
        if self.weight_decay:
            steps = torch._foreach_add(steps, tuple(params), alpha=self.weight_decay)
        velocities: tuple[Tensor, ...] = ()
        if self.momentum:
            velocities = torch._foreach_mul(tuple(moments), self.momentum)
            velocities = torch._foreach_add(velocities, steps)
            if self.nesterov:
                steps = torch._foreach_add(steps, velocities, alpha=self.momentum)
            else:
                steps = velocities
        return list(torch._foreach_mul(steps, -self.lr)), list(velocities)

    def step_(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        moments: Tensors,
        rates: StepRates = None,
    ) -> Tensors:
        """Step in place; plain SGD, the common case, by a single operation."""
        given = [grad for grad in grads if grad is not None]
        plain = not self.momentum and not self.weight_decay and self.only is None
        if not plain or len(given) < len(grads) or rates is not None:
            return super().step_(grads, params, moments, rates)
        torch._foreach_add_(list(params), given, alpha=-self.lr)
        return moments


@dataclass(frozen=True)
class Adam(UpdateRule):
    """m ← β1 m + (1−β1) g, v ← β2 v + (1−β2) g², θ ← θ − η m̂ / (√v̂ + ε), as ``torch.optim.Adam``.

    m̂ and v̂ are corrected for their start at zero (Kingma and Ba, arXiv 1412.6980, algorithm 1).
    Weight decay λ adds λθ to g, or decoupled (AdamW, arXiv 1711.05101) −ηλθ to the change. With
    β1 = 0, as in the Reptile paper, m is g and is not stored. The moments are m (if stored) and v
    of each parameter, then a vector of how many steps each has taken.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    differentiable: bool = False
    only: frozenset[int] | None = None

    @property
    def num_slots(self) -> int:
        """The first moment, unless β1 = 0 makes it the gradient, and the second."""
        return 2 if self.beta1 else 1

    def initial(self, params: Sequence[Tensor]) -> Tensors:
        """Return zero moments, and zero steps of each parameter."""
        # float64, as 1 − β2^t loses its digits in float32
        dtype = torch.float32 if params[0].device.type == "mps" else torch.float64
        counts = torch.zeros(len(params), dtype=dtype, device=params[0].device)
        return [torch.zeros_like(p) for _ in range(self.num_slots) for p in params] + [counts]

    def dense(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gradients; torch.optim's Adam takes no sparse ones either.

        Raises:
            ConfigurationError: one is sparse.
        """
        if any(grad.is_sparse for grad in grads):
            raise ConfigurationError(
                [
                    "inner_optimizer is Adam, which takes no sparse gradients: make the Embedding "
                    "with sparse=False, or choose 'sgd'"
                ]
            )
        return grads

    def changes(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Return −η m̂ / (√v̂ + ε) with weight decay, and the next moments."""
        steps, counts = tuple(grads), moments[-1] + 1
        if self.weight_decay and not self.decoupled:
            steps = torch._foreach_add(steps, tuple(params), alpha=self.weight_decay)
        first: tuple[Tensor, ...] = ()
        second = tuple(moments[-1 - len(params) : -1])
        second = torch._foreach_mul(second, self.beta2)
        second = torch._foreach_addcmul(second, steps, steps, value=1 - self.beta2)
        if self.beta1:
            first = torch._foreach_mul(tuple(moments[: len(params)]), self.beta1)
            first = torch._foreach_add(first, steps, alpha=1 - self.beta1)
            steps = first
        roots = _roots(second) if self.differentiable else torch._foreach_sqrt(second)
        roots = torch._foreach_div(roots, _correction(self.beta2, counts).sqrt().unbind())
        roots = torch._foreach_add(roots, self.eps)
        rates = (-self.lr / _correction(self.beta1, counts)).unbind()
        changes = torch._foreach_mul(torch._foreach_div(steps, roots), rates)
        if self.weight_decay and self.decoupled:
            decay = -self.lr * self.weight_decay
            changes = torch._foreach_add(changes, tuple(params), alpha=decay)
        return list(changes), [*first, *second, counts]


def _correction(beta: float, counts: Tensor) -> Tensor:
    """Return 1 − β^t for each count t.

    As an exponential, whose result the compiler keeps: a power it would compute once more for
    every few elements of a parameter, which costs more than all else in the update.
    """
    return 1 - (counts * math.log(beta)).exp() if beta else torch.ones_like(counts)


def _roots(squares: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return square roots whose derivative at zero is zero, where √'s own is infinite.

    A parameter that a task does not move (behind a dead ReLU) would otherwise turn MAML's whole
    meta-gradient into NaN.
    """
    return tuple(torch.where(s > 0, s, 1).sqrt() * (s > 0) for s in squares)


class Group(NamedTuple):
    """A parameter group: the places of its parameters, and those settings that are plain values."""

    places: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]


Layout = tuple[Group, ...]


def layout_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Layout:
    """Return what the groups of an optimizer are made of.

    Raises:
        ConfigurationError: it was given none of ``params``, or something else.
    """
    place = {id(param): i for i, param in enumerate(params)}
    given = [param for group in optimizer.param_groups for param in group["params"]]
    if not given or any(id(param) not in place for param in given):
        what = "other tensors than its params" if given else "none of its params"
        raise ConfigurationError(
            [
                f"inner_optimizer made {type(optimizer).__name__} with {what}: the callable "
                "(params, lr) must give it all or some of the params that it is called with, which "
                "are those of a copy of the model, in the model's order"
            ]
        )
    return tuple(
        Group(
            tuple(place[id(param)] for param in group["params"]),
            tuple(item for item in sorted(group.items()) if _is_plain(item[1])),
        )
        for group in optimizer.param_groups
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def of_part(factory: OptimizerFactory, places: tuple[int, ...] | None) -> OptimizerFactory:
    """Return a factory of all parameters that gives ``factory`` those at some places."""
    if places is None:
        return factory
    return lambda params, lr: factory([params[i] for i in places], lr)


def make_optimizer(
    factory: OptimizerFactory, params: Sequence[Tensor], lr: float
) -> torch.optim.Optimizer:
    """Call the user's factory and check what it gives.

    Raises:
        ConfigurationError: it gave no ``torch.optim.Optimizer``, one that calls the loss itself, or
            one of no or of other parameters.
    """
    try:
        optimizer = factory(list(params), lr)
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        raise ConfigurationError(
            [
                "inner_optimizer gave an optimizer none of its params, of which there are "
                f"{len(params)}: the callable (params, lr) must give it all or some of them"
            ]
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            [
                f"inner_optimizer returned {type(optimizer).__name__}: the callable "
                "(params, lr) must return a torch.optim.Optimizer"
            ]
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            [
                f"inner_optimizer gave {type(optimizer).__name__}, whose step calls the loss as "
                "often as it likes: an inner step has one gradient, so choose an optimizer that "
                "needs no closure"
            ]
        )
    layout_of(optimizer, params)
    return optimizer
