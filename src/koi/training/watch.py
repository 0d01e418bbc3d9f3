"""Warnings about what runs but is probably not meant: they save a user an afternoon."""

from __future__ import annotations

import sys
import warnings

from koi.algorithms import Algorithm
from koi.errors import KoiWarning
from koi.phi.outcome import Outcome

# Losses of one task on two minibatches differ by chance; three in four tasks rising is no chance.
_WINDOW = 100
_RISING = 0.75


def warn(message: str) -> None:
    """Warn of the line outside this package that called `koi.Koi`'s methods."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("koi."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, KoiWarning, stacklevel=level)


class Watch:
    """Looks at each meta-iteration of a training and warns once about each trouble.

    Where several processes train together, all but one are ``silent``.
    """

    def __init__(self, algorithm: Algorithm, num_steps: int, silent: bool = False) -> None:
        self._silent = silent
        self._seen = self._rising = 0
        self._warned: set[str] = set()
        if num_steps == 1 and not algorithm.query_gradient:
            self._once(
                f"num_steps = 1: with one inner step {type(algorithm).__name__} is joint "
                "training on all tasks (section 3 of the paper), not meta-learning; take at least 2"
            )

    def look(self, outcome: Outcome, epsilon: float, update_norm: float, num_steps: int) -> None:
        """Look at what a meta-batch gave after ``num_steps`` and how far φ moved."""
        if update_norm == 0 and epsilon > 0 and outcome.losses:
            self._once(
                "the meta-update is exactly zero: adapting to these tasks changes nothing; is the "
                "loss flat, or the model detached from it?"
            )
        for losses in filter(None, outcome.losses):  # an inner loop of a task's own tells none
            self._seen += 1
            self._rising += losses[num_steps - 1] > losses[0]
        if self._seen >= _WINDOW:
            if self._rising > _RISING * self._seen:
                self._once(
                    f"the loss rose in the inner loop on {self._rising} of {self._seen} tasks: "
                    "step_size is probably too large"
                )
            self._seen = self._rising = 0

    def _once(self, message: str) -> None:
        kind = message.split(":")[0].split(" on ")[0]
        if kind not in self._warned and not self._silent:
            self._warned.add(kind)
            warn(message)
