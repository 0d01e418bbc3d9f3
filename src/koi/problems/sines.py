"""The sine waves of the paper (section 5.1 and figure 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from koi import allowed
from koi.supervised import SupervisedTask


class Sines:
    """Waves f(x) = a · sin(x + b), a from U[0.1, 5], b from U[0, 2π], on 50 points of [−5, 5].

    The support set is num_points of the 50, drawn without replacement, in random order; the query
    set is all 50, in the same order. The loss is the mean squared error.

    Args:
        num_points: support points of each wave, at most 50.
        batch_size: points in each inner step; None: all.

    Raises:
        ConfigurationError: numbers that cannot be had.

    >>> task = Sines(num_points=10).sample()
    >>> task.support_inputs.shape, task.query_inputs.shape
    (torch.Size([10, 1]), torch.Size([50, 1]))
    >>> Sines().sample_batch(3).support_targets.shape
    torch.Size([3, 50, 1])
    """

    grid_size = 50

    def __init__(self, num_points: int = 50, batch_size: int | None = 10) -> None:
        allowed.check(
            num_points=(num_points, allowed.count(1, self.grid_size)),
            batch_size=(batch_size, allowed.optional(allowed.count(1))),
        )
        self.num_points = num_points
        self.batch_size = batch_size
        self._grid = torch.linspace(-5, 5, self.grid_size).unsqueeze(1)

    def sample(self) -> SupervisedTask:
        """Draw one wave."""
        amplitude, phase = torch.rand(2).tolist()
        x = self._grid.index_select(0, torch.randperm(self.grid_size))
        y = (0.1 + 4.9 * amplitude) * torch.sin(x + 2 * math.pi * phase)
        support = slice(self.num_points)
        return self._task(x[support], y[support], x, y, torch.randint(2**62, ()))

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        """Draw many waves at once; each tensor has them along its first dimension."""
        allowed.check(num_tasks=(num_tasks, allowed.count(1)))
        amplitude, phase = torch.rand(2, num_tasks, 1, 1).unbind()
        noise = torch.rand(num_tasks, self.grid_size, dtype=torch.float32)
        # positive floats have the order of their bits, and integers are sorted faster
        order = noise.view(torch.int32).argsort(1)
        x = self._grid[order]
        y = (0.1 + 4.9 * amplitude) * torch.sin(x + 2 * math.pi * phase)
        support = slice(self.num_points)
        keys = torch.randint(2**62, (num_tasks,))
        return self._task(x[:, support], y[:, support], x, y, keys)

    def _task(
        self, inputs: Tensor, targets: Tensor, grid: Tensor, values: Tensor, key: Tensor
    ) -> SupervisedTask:
        return SupervisedTask(inputs, targets, grid, values, key, batch_size=self.batch_size)
