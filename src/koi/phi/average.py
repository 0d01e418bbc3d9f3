"""The exponential mean of φ over a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from koi.phi.arithmetic import Tensors, clone, same_tensors


@dataclass
class ExponentialMean:
    """m_t, the mean of φ_1 … φ_t in which each weighs β times as much as the next.

    m_t = Σ β^(t−i) φ_i · (1 − β) / (1 − β^t), so that the beginning φ_0 has no part in it: Adam's
    correction (Kingma and Ba, arXiv 1412.6980, section 3), here as
    m_t = m_{t−1} + (φ_t − m_{t−1}) · (1 − β) / (1 − β^t).

    Args:
        values: m_t, a tensor for each of φ.
        count: t.
        of: the tensors of which it is the mean; where others come, it begins anew.

    >>> mean, phi = ExponentialMean(), torch.zeros(1)
    >>> for value in (2.0, 4.0):
    ...     mean.add([phi.fill_(value)], decay=0.5)
    >>> mean.values  # (0.5 · 2 + 1 · 4) / 1.5
    [tensor([3.3333])]
    """

    values: Tensors = field(default_factory=list)
    count: int = 0
    of: Sequence[Tensor] = ()

    @torch.no_grad()
    def add(self, phi: Sequence[Tensor], decay: float) -> None:
        """Take in φ_t."""
        if not same_tensors(phi, self.of):
            self.values, self.count, self.of = clone(phi), 0, list(phi)
        self.count += 1
        weight = (1 - decay) / (1 - decay**self.count)
        for value, tensor in zip(self.values, phi, strict=True):
            value.lerp_(tensor, weight)
