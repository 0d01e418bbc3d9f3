"""The sine waves of the paper (section 5.1 and figure 1)."""

from __future__ import annotations

import math
from typing import cast

import torch

from koi.errors import ConfigurationError
from koi.tasks import SupervisedTask, TaskBatch


class Sines:
    """Waves f(x) = a · sin(x + b), a from U[0.1, 5], b from U[0, 2π], on 50 points of [−5, 5].

    The support set is num_points of the 50, drawn without replacement, in random order; the query
    set is all 50. The loss is the mean squared error.

    Args:
        num_points: support points of each wave, at most 50.
        batch_size: points in each inner step.

    >>> task = Sines(num_points=10).sample()
    >>> task.support_inputs.shape, task.query_inputs.shape
    (torch.Size([10, 1]), torch.Size([50, 1]))
    >>> Sines().sample_batch(3).support_targets.shape
    torch.Size([3, 50, 1])
    """

    grid_size = 50

    def __init__(self, num_points: int = 50, batch_size: int = 10) -> None:
        if not 1 <= num_points <= self.grid_size:
            raise ConfigurationError(
                [f"num_points = {num_points!r}: must be from 1 to {self.grid_size}"]
            )
        self.num_points = num_points
        self.batch_size = batch_size

    def sample(self) -> SupervisedTask:
        """Draw one wave."""
        return cast(SupervisedTask, TaskBatch(stacked=self.sample_batch(1)).tasks[0])

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        """Draw many waves at once; each tensor has them along its first dimension."""
        amplitude = 0.1 + 4.9 * torch.rand(num_tasks, 1, 1)
        phase = 2 * math.pi * torch.rand(num_tasks, 1, 1)
        grid = torch.linspace(-5, 5, self.grid_size).reshape(1, -1, 1)
        values = amplitude * torch.sin(grid + phase)
        order = torch.rand(num_tasks, self.grid_size).argsort(1)[:, : self.num_points]
        order = order.unsqueeze(2)
        grid = grid.expand(num_tasks, -1, -1)
        return SupervisedTask(
            support_inputs=grid.gather(1, order),
            support_targets=values.gather(1, order),
            query_inputs=grid,
            query_targets=values,
            key=torch.randint(2**62, (num_tasks,)),
            batch_size=self.batch_size,
        )
