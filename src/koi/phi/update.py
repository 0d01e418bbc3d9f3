"""The meta-update: how φ moves once every task of the meta-batch has been adapted to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from koi.errors import ConfigurationError, NonFiniteError
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Outcome, Phi
from koi.phi.rates import scaled_rates

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s

MetaOptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class Moves(Protocol):
    """What the meta-update asks of an algorithm (`koi.algorithms.Algorithm`)."""

    def meta_gradient(self, phi: Tensors, mean: Tensors, /) -> Tensors:
        """Return the gradient that a meta-optimizer is fed, of the mean over tasks."""

    def move_(self, phi: Tensors, mean: Tensors, epsilon: float, /) -> None:
        """Move φ in place by ε; it goes as far as ε times the gradient is long."""


class Moved(NamedTuple):
    """How far a meta-update went: Euclidean norms.

    Args:
        update: of the change of φ's parameters.
        gradient: of the meta-gradient, before it was clipped.
    """

    update: float
    gradient: float


class MetaUpdate:
    """Moves φ by what a meta-batch gave, wholly or not at all.

    How, the algorithm says: by ε, or, where there is a meta-optimizer, by what gradient that is
    fed, with a rate of its own that ε scales. ``clip_meta`` scales a meta-gradient g down to
    g · min(1, clip_meta / (|g| + 10⁻⁶)), as `torch.nn.utils.clip_grad_norm_` does. Buffers always
    follow ε, beside a meta-optimizer at most 1: floating and complex ones by
    φ_b ← φ_b + ε · mean(φ̃_b − φ_b), bit for bit as they were where no task changed them; integers
    and flags, which have no mean, become what the last task left.
    """

    def __init__(
        self, algorithm: Moves, phi: Phi, make_optimizer: MetaOptimizerFactory | None
    ) -> None:
        self.phi = phi
        self.algorithm = algorithm
        self.make_optimizer = make_optimizer
        self.optimizer = None if make_optimizer is None else make_optimizer(phi.learned)
        made = make_optimizer is not None
        if made and not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ConfigurationError(
                [
                    f"meta_optimizer returned {type(self.optimizer).__name__}: the callable "
                    "(params) must return a torch.optim.Optimizer"
                ]
            )

    @torch.no_grad()
    def apply(self, outcome: Outcome, epsilon: float, clip: float | None = None) -> Moved:
        """Move φ and its buffers.

        Args:
            outcome: what the meta-batch gave.
            epsilon: ε.
            clip: the largest norm of the meta-gradient; None: any.

        Raises:
            NonFiniteError: the change is not finite.
        """
        params, algorithm = self.phi.learned, self.algorithm
        self._check_buffers(outcome)
        gradient, norm = None, outcome.distance
        if self.optimizer is not None or norm is None:
            gradient = algorithm.meta_gradient(params, outcome.given)
            norm = self.phi.names.norm(gradient) if norm is None else norm
        share = 1.0 if clip is None else min(1.0, clip / (norm + _CLIP_EPS))
        if self.optimizer is None:
            size = self._finite(epsilon * share * norm)
            algorithm.move_(params, outcome.given, epsilon * share)
        else:
            assert gradient is not None
            if share < 1:
                gradient = list(torch._foreach_mul(gradient, share))
            size = self._step(self.optimizer, gradient, epsilon)
            epsilon = min(epsilon, 1.0)
        arithmetic.move_(self.phi.buffers, outcome.buffers, epsilon)
        if epsilon > 0:
            arithmetic.copy_(self.phi.constants, outcome.constants)
        return Moved(size, norm)

    def _check_buffers(self, outcome: Outcome) -> None:
        for name, value, change in zip(
            self.phi.names.buffers, self.phi.buffers, outcome.buffers, strict=True
        ):
            if not bool(change.isfinite().all()):
                was = "" if bool(value.isfinite().all()) else ", whose values were not all finite"
                raise NonFiniteError(
                    f"the buffer {name!r}{was}, was changed by what is not finite, and cannot be "
                    "averaged over tasks: φ is as it was before; let it begin at finite values, "
                    "for example by running one batch through the model"
                )

    def _step(self, optimizer: torch.optim.Optimizer, gradient: Tensors, epsilon: float) -> float:
        params = self.phi.learned
        before, users_grads = arithmetic.clone(params), [p.grad for p in params]
        state = {param: copy.deepcopy(kept) for param, kept in optimizer.state.items()}
        groups = [
            copy.deepcopy({name: value for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]
        try:
            for param, grad in zip(params, gradient, strict=True):
                param.grad = grad
            with scaled_rates(optimizer, epsilon):
                optimizer.step()
            return self._finite(self.phi.names.norm(arithmetic.difference(params, before)))
        except BaseException:
            arithmetic.copy_(params, before)
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                group.update(saved)
            raise
        finally:
            for param, grad_before in zip(params, users_grads, strict=True):
                param.grad = grad_before

    @staticmethod
    def _finite(size: float) -> float:
        if not math.isfinite(size):
            raise NonFiniteError(
                f"the meta-update has norm {size}: φ is as it was before; try a smaller step_size "
                "or meta_step_size"
            )
        return size
