"""Evaluation: which tasks are drawn, and means over them, with intervals, after each inner step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koi import allowed
from koi.errors import NonFiniteError
from koi.randomness import Place
from koi.sampling import draw
from koi.tasks import TaskBatch

# Tasks of an evaluation are drawn and, where they can be, adapted to so many at a time.
_BLOCK = 100

# two-sided 95 % of the normal distribution
_NORMAL_95 = 1.959963984540054


def blocks(
    distribution: Any, num_tasks: int, seed: int | None
) -> Iterator[tuple[Place, TaskBatch]]:
    """Draw the tasks of an evaluation, at most a hundred at a time."""
    for block, first in enumerate(range(0, num_tasks, _BLOCK)):
        place = Place(seed, "evaluation block", block)
        yield place, draw(distribution, min(_BLOCK, num_tasks - first), place)


def stacked(rows: Sequence[Tensor], num_tasks: int) -> Tensor:
    """Return the rows of those of ``num_tasks`` tasks that were kept, as one tensor.

    Raises:
        NonFiniteError: none was kept.
    """
    if not rows:
        raise NonFiniteError(
            f"all of the {num_tasks} tasks were left out as not finite, so that nothing can be "
            "said of them: try a smaller step_size"
        )
    return torch.stack(list(rows))


def mean_and_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first dimension and the half-width of its 95 % interval.

    The half-width is 1.96 · s / √n with the sample standard deviation s: the interval of a mean of
    n independent tasks, by the central limit theorem. With a single task it is NaN.

    >>> import torch
    >>> mean, half = mean_and_interval(torch.tensor([[1.0], [3.0]]))
    >>> mean.item(), round(half.item(), 3)
    (2.0, 1.96)
    """
    values = values.double()
    count = values.shape[0]
    mean = values.mean(0)
    if count < 2:
        return mean, mean * math.nan
    return mean, values.std(0) * (_NORMAL_95 / math.sqrt(count))


def counted(num_tasks: int, num_skipped: int, what: str = "tasks") -> str:
    """Return how many tasks a mean is over, and how many were left out, in words.

    >>> counted(1000, 0), counted(98, 2)
    ('1,000 tasks', '98 tasks; 2 left out as not finite')
    """
    left_out = f"; {num_skipped:,} left out as not finite" if num_skipped else ""
    return f"{num_tasks:,} {what}{left_out}"


@dataclass(frozen=True)
class Evaluation:
    """The loss on each task's query set, before adaptation and after each inner step.

    Args:
        losses: shape (num_tasks, num_steps + 1); column k is after k inner steps.
        num_skipped: how many tasks more were left out, since a loss of theirs was not finite.

    >>> import torch
    >>> evaluation = Evaluation(torch.tensor([[4.0, 1.0], [2.0, 1.0]]))
    >>> evaluation.before, evaluation.after
    (3.0, 1.0)
    >>> print(evaluation)
    steps   query loss   95 % interval
        0            3             ± 2
        1            1             ± 0
    (mean over 2 tasks)
    """

    losses: Tensor
    num_skipped: int = 0

    def __post_init__(self) -> None:
        allowed.check(losses=(self.losses, _rows), num_skipped=(self.num_skipped, allowed.count(0)))

    @property
    def num_tasks(self) -> int:
        """How many tasks the means are over."""
        return self.losses.shape[0]

    @property
    def num_steps(self) -> int:
        """How many inner steps were taken on each."""
        return self.losses.shape[1] - 1

    @property
    def mean(self) -> list[float]:
        """Mean query loss after 0, 1, … num_steps inner steps."""
        return [float(value) for value in mean_and_interval(self.losses)[0]]

    @property
    def interval(self) -> list[float]:
        """Half-widths of the 95 % intervals of `mean` (see `mean_and_interval`)."""
        return [float(value) for value in mean_and_interval(self.losses)[1]]

    @property
    def before(self) -> float:
        """Mean query loss of φ itself."""
        return self.mean[0]

    @property
    def after(self) -> float:
        """Mean query loss after the last inner step."""
        return self.mean[-1]

    def __str__(self) -> str:
        """Return a table of the curve at 0, 1, 2, 4, 8 … steps and at the last."""
        rows = [f"{'steps':>5}   {'query loss':>10}   {'95 % interval':>13}"]
        mean, interval = self.mean, self.interval
        for step in doubling(self.num_steps):
            rows.append(f"{step:>5}   {mean[step]:>10.4g}   {f'± {interval[step]:.2g}':>13}")
        return "\n".join([*rows, f"(mean over {counted(self.num_tasks, self.num_skipped)})"])


_rows = allowed.that(
    lambda value: (
        isinstance(value, Tensor)
        and (value.dim() == 2 and value.numel() > 0 and value.dtype.is_floating_point)
    ),
    "a tensor of losses, shape (num_tasks, num_steps + 1)",
)


def doubling(last: int) -> list[int]:
    """Return 0, 1, 2, 4, 8 … up to ``last``, which is always there.

    >>> doubling(10)
    [0, 1, 2, 4, 8, 10]
    """
    steps = [0, *(2**k for k in range(last.bit_length()))]
    return steps if steps[-1] == last or last == 0 else [*steps, last]
