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
    doubled after 2,000 steps without. The step that overflowed is left out, of the task that it
    happened to alone.
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

    def unscaled(
        self, grads: Sequence[Tensor | None], num_tasks: int | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients without the factor; none, or zero rows, where they overflowed.

        Args:
            grads: gradients of the scaled loss.
            num_tasks: rows of stacked gradients; None: they are one task's.
        """
        factor, rows = self.factor, 1 if num_tasks is None else num_tasks
        given = [grad for grad in grads if grad is not None]
        finite = torch.stack([g.reshape(rows, -1).isfinite().all(1) for g in given]).all(0)
        if bool(finite.all()):
            self._clean += 1
            if self._clean == _PATIENCE:
                self.factor, self._clean = 2 * factor, 0
            return tuple(None if grad is None else grad / factor for grad in grads)
        self.factor, self._clean = factor / 2, 0
        if num_tasks is None:
            return tuple(None for _ in grads)
        return tuple(None if g is None else _kept(g / factor, finite) for g in grads)


def _kept(grad: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (grad.dim() - 1)), grad, 0)
