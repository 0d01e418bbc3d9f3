"""Straight lines: the smallest family of tasks, for a first try and for tests."""

from __future__ import annotations

from typing import cast

import torch

from koi import allowed
from koi.supervised import SupervisedTask
from koi.tasks import TaskBatch


class Lines:
    """Lines f(x) = a · x + b with a, b from U[−5, 5], seen at points x from U[−5, 5].

    Support and query points are drawn apart; the loss is the mean squared error.

    Args:
        num_points: support points of each line, and as many query points.
        batch_size: points in each inner step; None: all.

    Raises:
        ConfigurationError: numbers that are no positive whole numbers.

    >>> Lines(num_points=20).sample().support_inputs.shape
    torch.Size([20, 1])
    """

    def __init__(self, num_points: int = 100, batch_size: int | None = None) -> None:
        allowed.check(
            num_points=(num_points, allowed.count(1)),
            batch_size=(batch_size, allowed.optional(allowed.count(1))),
        )
        self.num_points = num_points
        self.batch_size = batch_size

    def sample(self) -> SupervisedTask:
        """Draw one line."""
        return cast(SupervisedTask, TaskBatch(stacked=self.sample_batch(1)).tasks[0])

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        """Draw many lines at once; each tensor has them along its first dimension."""
        allowed.check(num_tasks=(num_tasks, allowed.count(1)))
        slope, intercept = 10 * torch.rand(2, num_tasks, 1, 1) - 5
        support, query = 10 * torch.rand(2, num_tasks, self.num_points, 1) - 5
        return SupervisedTask(
            support_inputs=support,
            support_targets=slope * support + intercept,
            query_inputs=query,
            query_targets=slope * query + intercept,
            key=torch.randint(2**62, (num_tasks,)),
            batch_size=self.batch_size,
        )
