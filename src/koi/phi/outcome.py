"""What passes between the inner loop and the meta-update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from koi.errors import TaskError
from koi.phi.arithmetic import RunningMean, Tensors, clone
from koi.phi.learned import Learned


@dataclass
class Phi:
    """Where every task of a meta-batch starts: φ, its buffers, and the optimizer's moments.

    With it go the rates of each inner step and of each parameter, shape (num_steps, parameters),
    None where all are the optimizer's own; and the learned ones (`koi.phi.rates.LearnedRates`),
    which are a part of φ and multiply these.
    """

    params: Tensors
    buffers: Tensors
    constants: Tensors
    moments: Tensors | None
    names: Learned
    rates: Tensor | None = None
    learned_rates: Tensors = field(default_factory=list)

    @property
    def learned(self) -> Tensors:
        """What the meta-update moves: parameters, then learned rates."""
        return [*self.names.those_learned(self.params), *self.learned_rates]


@dataclass
class Outcome:
    """What a meta-batch gives back, each a mean over its tasks.

    Args:
        given: what the algorithm makes of each task: a point, or a gradient.
        buffers: how far tasks moved the floating and complex buffers, exactly zero where none did.
        constants: the other buffers, which have no mean: as the last task left them.
        moments: the inner optimizer's moments after the last step.
        losses: for each task the loss at each inner step, before its update, then the query loss
            where the algorithm has its gradient. Skipped tasks are not in it.
        num_skipped: how many tasks were left out; when all were, the lists are empty.
        distance: the Euclidean norm of the meta-gradient, where the engine knows it anyway.
        weights: what each task of ``losses`` counts in the means; None: all the same. Where they
            are all 0 the other lists are empty.
    """

    given: Tensors
    buffers: Tensors
    constants: Tensors
    moments: Tensors
    losses: list[list[float]]
    num_skipped: int = 0
    distance: float | None = None
    weights: list[float] | None = None

    @property
    def weight(self) -> float:
        """What all tasks count together."""
        return len(self.losses) if self.weights is None else sum(self.weights)

    def check_weight(self, place: object) -> None:
        """Check that some task counts.

        Args:
            place: which meta-iteration this is.

        Raises:
            TaskError: all weights are 0.
        """
        if self.losses and self.weight == 0 and not self.num_skipped:
            raise TaskError(
                f"all tasks of {place} have weight 0, of which there is no mean: φ is as it was "
                "before; give one of them another weight"
            )


class OutcomeMean:
    """Gathers the outcome of a meta-batch, task by task or chunk by chunk.

    Args:
        copy: False where a single task is gathered, whose tensors then need no copy.
    """

    def __init__(self, copy: bool = True) -> None:
        self._given, self._buffers, self._moments = (RunningMean(copy) for _ in range(3))
        self._constants: Tensors = []
        self._losses: list[list[float]] = []
        self._weights: list[float] = []

    def add(
        self,
        given: Sequence[Tensor],
        buffers: Sequence[Tensor],
        constants: Sequence[Tensor],
        moments: Sequence[Tensor],
        losses: list[list[float]],
        weights: list[float],
    ) -> None:
        """Add means over as many tasks as there are lists of losses, each of which has a weight."""
        self._losses += losses
        self._weights += weights
        total = sum(weights)
        if total > 0:
            self._given.add(given, total)
            self._buffers.add(buffers, total)
            self._constants = clone(constants)
            self._moments.add(moments, total)

    def outcome(self, num_tasks: int, distance: float | None = None) -> Outcome:
        """Return the means, over all but the skipped of ``num_tasks`` tasks."""
        return Outcome(
            self._given.value(),
            self._buffers.value(),
            self._constants,
            self._moments.value(),
            self._losses,
            num_skipped=num_tasks - len(self._losses),
            distance=distance,
            weights=self._weights,
        )
