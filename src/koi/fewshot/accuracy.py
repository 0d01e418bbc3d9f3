"""Few-shot accuracy by the paper's protocol: two ways to classify, from one adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from koi import allowed
from koi.errors import ConfigurationError, wrong
from koi.evaluation import counted, mean_and_interval
from koi.supervised import SupervisedTask


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval (`mean_and_interval`).

    >>> print(Estimate(0.9539, 0.0009))
    95.39 ± 0.09 %
    """

    mean: float
    interval: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f} %"


@dataclass(frozen=True)
class Accuracy:
    """The fraction of its queries that each task's adapted model classifies rightly.

    The 95 % interval of a mean over n tasks has the half-width 1.96 · s / √n, s the standard
    deviation over tasks.

    Args:
        fractions: shape (num_tasks, 2): transductive, inductive.
        num_skipped: how many tasks more were left out, as what came of them was not finite.

    >>> print(Accuracy(torch.tensor([[1.0, 0.8], [0.8, 0.8]])))
    transductive 90.00 ± 19.60 %, inductive 80.00 ± 0.00 % (2 tasks)
    """

    fractions: Tensor
    num_skipped: int = 0

    def __post_init__(self) -> None:
        may_be = allowed.count(0)
        allowed.check(fractions=(self.fractions, _pairs), num_skipped=(self.num_skipped, may_be))

    @property
    def num_tasks(self) -> int:
        """How many tasks the means are over."""
        return self.fractions.shape[0]

    @property
    def transductive(self) -> Estimate:
        """All queries of a task in one forward: batch statistics see them together."""
        return self._estimate(0)

    @property
    def inductive(self) -> Estimate:
        """Each query in a forward of its own, together with the support set."""
        return self._estimate(1)

    def _estimate(self, column: int) -> Estimate:
        mean, interval = mean_and_interval(self.fractions[:, column])
        return Estimate(mean.item(), interval.item())

    def __str__(self) -> str:
        tasks = counted(self.num_tasks, self.num_skipped)
        return f"transductive {self.transductive}, inductive {self.inductive} ({tasks})"


class Learner(Protocol):
    """What can be measured: a `koi.Koi`."""

    def measure(
        self,
        tasks: Any,
        metric: Any,
        num_tasks: int = ...,
        num_steps: int | None = ...,
        step_size: Any = ...,
    ) -> Tensor:
        """Adapt to tasks and return the metric of each that is kept."""


def accuracy(
    koi: Learner,
    episodes: Any,
    num_tasks: int = 1000,
    num_steps: int | None = None,
    step_size: Any = None,
) -> Accuracy:
    """Adapt to episodes and return how many of their queries are then classified rightly.

    The two ways differ for a model that normalises by the batch at hand, as the paper's do
    (`_test_predictions` in its code): *transductive* gives the model all queries of a task in one
    forward, *inductive* one query at a time, together with the support set. The paper's table
    marks the transductive rows; its other rows are inductive.

    Args:
        koi: the learner. Its inner optimizer's moments are where each adaptation starts, as in
            the paper.
        episodes: a distribution of tasks with support and query sets, such as `Episodes`.
        num_tasks: how many to sample; the paper takes 10,000.
        num_steps: inner steps on each; None: as in training.
        step_size: the inner rate, as the setting of `koi.Koi`; None: as in training.

    Raises:
        NonFiniteError: an adapted parameter is NaN or infinite; with ``on_nonfinite="skip"`` the
            task is left out and counted, and it is an error only if all are.

    >>> from koi import Koi
    >>> from koi.fewshot import Episodes
    >>> inputs, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    >>> episodes = Episodes((inputs, labels), num_ways=3, num_shots=2)
    >>> koi = Koi(torch.nn.Linear(4, 3), step_size=1.0, num_steps=20)
    >>> accuracy(koi, episodes, num_tasks=10).inductive.mean
    1.0
    """
    if not callable(getattr(koi, "measure", None)):
        raise ConfigurationError([wrong("koi", koi, "a koi.Koi")])
    fractions = koi.measure(episodes, both_ways, num_tasks, num_steps, step_size)
    return Accuracy(fractions, num_tasks - len(fractions))


_pairs = allowed.that(
    lambda value: isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 2,
    "a tensor of fractions, shape (num_tasks, 2)",
)


def both_ways(model: nn.Module, task: SupervisedTask) -> Tensor:
    """Return the fractions of a task's queries that are classified rightly, shape (2,).

    Args:
        model: adapted to the task.
        task: with class labels as targets.

    Returns:
        All queries in one forward; each in a forward of its own, last after the support set.
    """
    together = model(task.query_inputs)
    alone = inductive_scores(model, task.support_inputs, task.query_inputs)
    ways = getattr(task, "num_ways", None)  # of a ragged task; None: all outputs
    right = [scores[:, :ways].argmax(-1) == task.query_targets for scores in (together, alone)]
    return torch.stack(right).double().mean(1)


def inductive_scores(model: nn.Module, support_inputs: Tensor, query_inputs: Tensor) -> Tensor:
    """Return the scores of each query in a forward of its own, last after the support set.

    Args:
        model: adapted to the support set.
        support_inputs: shape (num_support, …).
        query_inputs: shape (num_query, …).

    Returns:
        Shape (num_query, num_ways).

    >>> norm = nn.BatchNorm1d(1, track_running_stats=False)
    >>> queries = torch.tensor([[1.0], [4.0]])
    >>> inductive_scores(norm, torch.tensor([[1.0], [1.0]]), queries).flatten().round(decimals=2)
    tensor([0.0000, 1.4100], grad_fn=...)
    """
    rows = [model(torch.cat([support_inputs, query.unsqueeze(0)]))[-1] for query in query_inputs]
    return torch.stack(rows)
