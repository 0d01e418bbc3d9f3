"""The learning rates of the inner loop: by name, over the training, and over the inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from koi.errors import ConfigurationError, did_you_mean
from koi.phi.learned import Learned
from koi.phi.schedules import Schedule, value_at

# What multiplies each parameter's rate at one inner step, one number or tensor for each; None where
# a parameter does not adapt, or 1 for all.
StepRates = Tensor | Sequence[Tensor | None] | None

# A number or a schedule of the fraction of the training that is done; or one for each name pattern.
Rate = float | Schedule
StepSize = Rate | Mapping[str, Rate]


def rate_of_each(names: Sequence[str], given: Mapping[str, Rate]) -> list[Rate]:
    """Return the rate of each parameter: that of the first pattern, shell style, which fits it.

    Raises:
        ConfigurationError: a pattern fits none, or a parameter has none.

    >>> rate_of_each(["body.weight", "head.weight"], {"head.*": 0.1, "*": 0.01})
    [0.01, 0.1]
    """
    matching = [next((p for p in given if fnmatchcase(name, p)), None) for name in names]
    problems = [
        f"step_size has {pattern!r}, and no parameter that adapts has such a name"
        f"{did_you_mean(pattern, names)}"
        for pattern in given
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    without = [name for name, found in zip(names, matching, strict=True) if found is None]
    if without:
        problems.append(f"step_size has no rate for {', '.join(without[:3])}: add one for '*'")
    if problems:
        raise ConfigurationError(problems)
    return [given[pattern] for pattern in matching if pattern is not None]


def rates(
    learned: Learned,
    step_size: StepSize,
    fraction: float,
    inner_schedule: Schedule | None,
    num_steps: int,
) -> Tensor:
    """Return the rate of each inner step and parameter: α_ij = α_i(fraction) · s(j / num_steps).

    Args:
        learned: the names of what moves; what does not adapt has the rate 0.
        step_size: α.
        fraction: of the training that is done, in [0, 1].
        inner_schedule: s; None: 1.
        num_steps: inner steps.

    Returns:
        Shape (num_steps, parameters), float64.

    >>> from koi.phi.schedules import linear
    >>> learned = Learned(("weight",), (), ())
    >>> rates(learned, linear(1.0, 0.5), 0.5, linear(1.0, 0.0), num_steps=2)
    tensor([[0.7500],
            [0.3750]], dtype=torch.float64)
    """
    names = learned.those_adapted(learned.params)
    if isinstance(step_size, Mapping):
        each = rate_of_each(names, step_size)
    else:
        each = [step_size] * len(names)
    own = dict(zip(names, (value_at(rate, fraction, "step_size") for rate in each), strict=True))
    values = [own.get(name, 0.0) for name in learned.params]
    factors = [
        1.0 if inner_schedule is None else value_at(inner_schedule, j / num_steps, "inner_schedule")
        for j in range(num_steps)
    ]
    return torch.tensor(factors, dtype=torch.float64).outer(
        torch.tensor(values, dtype=torch.float64)
    )


@dataclass(frozen=True)
class LearnedRates:
    """Learning rates that are a part of φ, a tensor for each parameter that adapts.

    "parameter": a rate for each number in it, α ∘ g (Meta-SGD, Li et al., arXiv 1707.09835,
    equation 2). "layer": one for each inner step, α_j g (Antoniou et al., *How to train your MAML*,
    arXiv 1810.09502, section 4, LSLR), shape (num_steps,); steps beyond these have the last one's.

    Args:
        kind: "parameter" or "layer".
        names: of what moves.
    """

    kind: str
    names: Learned

    @property
    def places(self) -> list[int]:
        """The places of what adapts among all parameters."""
        return self.names.those_adapted(range(len(self.names.params)))

    def first(self, params: Sequence[Tensor], step_size: StepSize, num_steps: int) -> list[Tensor]:
        """Return the rates before the first meta-iteration.

        >>> rates = LearnedRates("layer", Learned(("weight",), (), ()))
        >>> rates.first([torch.ones(2)], 0.5, num_steps=3)
        [tensor([0.5000, 0.5000, 0.5000])]
        """
        (each,) = rates(self.names, step_size, 0.0, None, 1)
        made = []
        for i in self.places:
            dtype = params[i].real.dtype if params[i].is_complex() else params[i].dtype
            shape = params[i].shape if self.kind == "parameter" else (num_steps,)
            made.append(params[i].new_full(shape, each[i].item(), dtype=dtype))
        return made

    def at(
        self,
        values: Sequence[Tensor],
        step: int,
        factors: Tensor | None,
        params: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Return what multiplies each parameter's change at an inner step.

        Args:
            values: the rates, or a row of them for each task.
            step: the number of the step.
            factors: of each parameter at this step, by a schedule; None: 1.
            params: the parameters, or a row of them for each task.
        """
        found: list[Tensor | None] = [None] * len(params)
        for i, value in zip(self.places, values, strict=True):
            rate = value
            if self.kind == "layer":
                rate = value[..., min(step, value.shape[-1] - 1)]
                rate = rate.reshape(rate.shape + (1,) * (params[i].dim() - rate.dim()))
            found[i] = rate if factors is None else rate * factors[i].to(rate.dtype)
        return found

    def pulled(
        self,
        values: Sequence[Tensor],
        step: int,
        factors: Tensor | None,
        params: Sequence[Tensor],
        adjoint: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the adjoint of the rates from that of what `at` made of them."""
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in values]
            made = [rate for rate in self.at(leaves, step, factors, params) if rate is not None]
            return list(torch.autograd.grad(made, leaves, adjoint))


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Scale the learning rates of an optimizer in the block, and let its own be as they were.

    Raises:
        ConfigurationError: a group has none.
    """
    if factor == 1:
        yield
        return
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    if None in rates:
        raise ConfigurationError(
            [
                f"{type(optimizer).__name__} has no lr that a schedule or ε could scale: leave "
                "these out, or take an optimizer with lr"
            ]
        )
    scaled = [rate * factor for rate in rates]
    for group, rate in zip(optimizer.param_groups, scaled, strict=True):
        group["lr"] = rate
    yield
    for group, rate, own in zip(optimizer.param_groups, scaled, rates, strict=True):
        if group["lr"] is rate:  # else the optimizer has set another
            group["lr"] = own
