"""The loss scale of float16, in which small gradients would otherwise vanish."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST = 2.0**16
_PATIENCE = 2000


class LossScale:
    """A factor that gradients are computed with and divided by, kept as large as goes well.

    As in ``torch.amp.GradScaler`` it starts at 65536, is halved where a gradient overflows, and
    doubled after 2,000 steps without. The step that overflowed is left out, as if there had been
    none.
    """

    def __init__(self) -> None:
        self.factor = _FIRST
        self._clean = 0

    def state(self) -> tuple[float, int]:
        """Return the factor and the steps since it changed, for a checkpoint."""
        return self.factor, self._clean

    def put(self, state: tuple[float, int]) -> None:
        """Go on from what `state` has given."""
        self.factor, self._clean = state

    def unscaled(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """Return the gradients without the factor; None where one of them overflowed.

        Then no step is to be taken at all: with zeros in their place momentum would go on, weights
        decay and moments fade.

        Args:
            grads: gradients of the scaled loss of one task; None where it does not use a parameter.
        """
        given = [grad for grad in grads if grad is not None]
        if given and not torch.stack([grad.isfinite().all() for grad in given]).all():
            self.factor, self._clean = self.factor / 2, 0
            return None
        factor = self.factor
        self._clean += 1
        if self._clean == _PATIENCE:
            self.factor, self._clean = 2 * factor, 0
        return tuple(None if grad is None else grad / factor for grad in grads)
