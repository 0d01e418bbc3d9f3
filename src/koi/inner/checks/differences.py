"""Whether MAML's gradient is that of the loss after the inner loop, by central differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from koi.algorithms import FOMAML
from koi.inner.checks.plain import Plain
from koi.phi.arithmetic import Tensors, largest, norm
from koi.randomness import States

# A contradiction is one beyond so much of the gradient's length, and so many times what differences
# of several sizes differ by among themselves.
_SURELY = 10
# The size of the finest difference, as a part of the largest.
_FINEST = 32


@dataclass(frozen=True)
class Losses:
    """The loss after the inner loop as a function of φ, on a few tasks.

    Args:
        plainly: the mean over the tasks in some way.
        plain: the plain way, with steps.
        start: φ.
        tasks: the tasks.
        states: of the generators, from which each run begins.
    """

    plainly: Callable[..., tuple[Tensors, float]]
    plain: Plain
    start: Tensors
    tasks: list[Any]
    states: States

    def contradict(self, gradient: Tensors) -> list[int]:
        """Return in which tensors a gradient is surely not that of these losses.

        Compared are ⟨g, v⟩ and (f(φ + hv) − f(φ − hv)) / 2h for some directions v. Nothing is said
        where differences see what autograd does not: something detached that depends on φ, such as
        running statistics or a padding row.
        """
        direction = self._direction(gradient)
        if not self._contradicts(gradient, direction) or not self._autograd_sees_all(direction):
            return []
        apart = [
            [v if i == j else torch.zeros_like(v) for j, v in enumerate(direction)]
            for i in range(len(direction))
        ]
        found = [i for i, own in enumerate(apart) if self._contradicts(gradient, own)]
        return found or list(range(len(direction)))

    @property
    def _eps(self) -> float:
        autocast = self.plain.inner.autocast
        kinds = [autocast] if autocast else [p.dtype for p in self.start]
        return max(torch.finfo(kind).eps for kind in kinds)

    def _direction(self, gradient: Tensors) -> Tensors:
        """Return the gradient's own direction, and a random one of the same size in it."""
        generator = torch.Generator().manual_seed(0)
        noise = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self.start
        ]
        sizes = [max(norm(part).item(), 1e-30) for part in (gradient, noise)]
        return [g / sizes[0] + v / sizes[1] for g, v in zip(gradient, noise, strict=True)]

    def _slope(self, direction: Tensors, h: float, plain: Plain) -> float:
        ends = []
        for sign in (1, -1):
            at = [p + sign * h * v for p, v in zip(self.start, direction, strict=True)]
            ends.append(self.plainly(at, self.tasks, self.states, plain)[1])
        return (ends[0] - ends[1]) / (2 * h)

    def _contradicts(
        self, gradient: Tensors, direction: Tensors, plain: Plain | None = None
    ) -> bool:
        plain = plain or self.plain
        h = self._eps ** (1 / 3) * (1 + max(map(largest, self.start)))
        *slopes, finest = [self._slope(direction, h / part, plain) for part in (1, 2, 4, _FINEST)]
        rounding = self._eps**0.6 * norm(gradient).item() * norm(direction).item()
        spread = max(slopes) - min(slopes)
        # After steps of a normalised gradient, as Adam's first are, a loss can be so rough that
        # coarse differences agree among themselves and see nothing of its slope.
        if abs(finest - slopes[-1]) > 2 * spread + _FINEST * rounding:
            return False
        return not abs(slopes[1] - _product(gradient, direction)) <= _SURELY * (spread + rounding)

    def _autograd_sees_all(self, direction: Tensors) -> bool:
        """Return whether autograd's gradient is that of differences where no step is taken.

        Then the meta-gradient is the loss's own, in which nothing but what is detached is missing.
        """
        inner = replace(self.plain.inner, algorithm=FOMAML())
        still = replace(self.plain, steps=False, inner=inner)
        gradient, _ = self.plainly(self.start, self.tasks, self.states, still)
        return not self._contradicts(gradient, direction, still)


def _product(left: Tensors, right: Tensors) -> float:
    return sum((a.conj() * b).real.sum().item() for a, b in zip(left, right, strict=True))
