"""FOMAML: φ moves against the query loss's gradient where the inner loop ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from koi.algorithms.base import Adaptation, AgainstGradient
from koi.phi.arithmetic import Tensors


@dataclass(frozen=True)
class FOMAML(AgainstGradient):
    """φ ← φ − ε · mean(∇L_i(φ̃_i)): first-order MAML, as if φ̃ did not depend on φ.

    L_i is the loss on the query set of a task, or on what its last inner step saw where there is
    none. The paper is Finn, Abbeel, Levine, arXiv 1703.03400 (section 5.2); the form is that of
    Nichol et al., arXiv 1803.02999, section 2.2.

    >>> FOMAML()
    FOMAML()
    """

    query_gradient: ClassVar[bool] = True

    def gives(self, task: Adaptation) -> Tensors:
        """Return ∇L(φ̃), which the engine takes with respect to φ̃."""
        return task.gradient
