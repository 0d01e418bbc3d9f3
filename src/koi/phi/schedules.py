"""Schedules of ε: how large the steps of the meta-update are, over a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from koi.errors import ConfigurationError

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class linear:  # noqa: N801 (reads as a function, compares and prints as data)
    """A schedule from ``start`` to ``end``: (1 − f) · start + f · end at the fraction f done.

    The paper anneals ε this way (section 6); the last meta-iteration of N has f = (N − 1) / N.

    >>> linear(1.0, 0.0)(0.25)
    0.75
    """

    start: float
    end: float

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` in [0, 1]."""
        return (1 - fraction) * self.start + fraction * self.end


def value_at(schedule: float | Schedule, fraction: float) -> float:
    """Return ε at the fraction done, checking what the user's schedule gives.

    Raises:
        ConfigurationError: it is no finite number of at least 0.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(fraction)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigurationError(
            [
                f"the schedule meta_step_size gave {value!r} at the fraction {fraction:.4g}: "
                "it must give a finite number of at least 0"
            ]
        )
    return number
