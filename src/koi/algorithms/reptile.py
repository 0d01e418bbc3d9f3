"""Reptile: φ moves towards the adapted weights."""

from __future__ import annotations

from dataclasses import dataclass

from koi.algorithms.base import Adaptation, TowardsPoint
from koi.phi.arithmetic import Tensors


@dataclass(frozen=True)
class Reptile(TowardsPoint):
    """φ ← φ + ε · mean(φ̃_i − φ): algorithm 2 of Nichol, Achiam, Schulman, arXiv 1803.02999.

    With a meta-batch of one task it is their algorithm 1. No derivative is taken but those of the
    inner loop, and no query set is looked at.

    >>> Reptile()
    Reptile()
    """

    def gives(self, task: Adaptation) -> Tensors:
        """Return φ̃."""
        return task.end
