"""What is remembered of each meta-iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One meta-iteration of a training, an entry of ``koi.history``.

    Args:
        iteration: its number, from 0.
        loss_before: mean over tasks of the loss at the first inner step, thus at φ. Tasks count as
            their ``weight`` says.
        loss_after: mean over tasks of the last loss that was computed: at the last inner step,
            before its update (Reptile), or the query loss at φ̃ (FOMAML, MAML). No loss is
            evaluated for the record's sake.
        meta_step_size: ε.
        update_norm: Euclidean norm of the change of φ's parameters.
        seconds: wall time, sampling included.
        num_skipped: tasks left out by ``on_nonfinite="skip"``.
        meta_gradient_norm: Euclidean norm of the meta-gradient, φ − mean(φ̃) or the mean gradient,
            before ``clip_meta``.
        validation: what ``train(validate=…)`` measured after it; None: nothing.
    """

    iteration: int
    loss_before: float
    loss_after: float
    meta_step_size: float
    update_norm: float
    seconds: float
    num_skipped: int = 0
    meta_gradient_norm: float = math.nan
    validation: float | None = None


def mean_ends(losses: list[list[float]], weights: list[float] | None = None) -> tuple[float, float]:
    """Return the means over tasks of the first and of the last loss; NaN where there is no task.

    Args:
        losses: of each task.
        weights: what each counts; None: all the same.

    >>> mean_ends([[4.0, 1.0], [1.0, 1.0]], [2.0, 1.0])
    (3.0, 1.0)
    """
    weights = [1] * len(losses) if weights is None else weights
    total = sum(weights)
    if total == 0:
        return math.nan, math.nan
    pairs = list(zip(weights, losses, strict=True))
    return sum(w * row[0] for w, row in pairs) / total, sum(w * row[-1] for w, row in pairs) / total


class _Stop:
    """What a callback returns to end the training after its meta-iteration."""

    def __repr__(self) -> str:
        return "koi.STOP"

    def __reduce__(self) -> str:
        return "STOP"


STOP = _Stop()
