"""MAML: φ moves against the gradient of the query loss through all inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from koi.algorithms.base import Adaptation, AgainstGradient
from koi.phi.arithmetic import Tensors


@dataclass(frozen=True)
class MAML(AgainstGradient):
    """φ ← φ − ε · mean(d L_i(φ̃_i(φ)) / dφ): equation 1 of Finn, Abbeel, Levine, arXiv 1703.03400.

    L_i is the loss on the query set of a task, or on what its last inner step saw where there is
    none. Through many steps the gradient goes back one by one (`koi.inner.second_order`); the loss
    must have a second derivative, and the inner optimizer be SGD, Adam or AdamW.

    >>> MAML()
    MAML()
    """

    query_gradient: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    def gives(self, task: Adaptation) -> Tensors:
        """Return dL(φ̃(φ)) / dφ, which the engine takes with respect to φ."""
        return task.gradient
