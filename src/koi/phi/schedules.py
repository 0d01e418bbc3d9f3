"""Schedules of ε: how large the steps of the meta-update are, over a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from koi import allowed
from koi.errors import ConfigurationError

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class linear:  # noqa: N801 (reads as a function, compares and prints as data)
    """A schedule from ``start`` to ``end``: (1 − f) · start + f · end at the fraction f done.

    The paper anneals ε this way (section 6); the last meta-iteration of N has f = (N − 1) / N.

    Raises:
        ConfigurationError: ``start`` or ``end`` is no finite number of at least 0.

    >>> linear(1.0, 0.0)(0.25)
    0.75
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        allowed.check(start=(self.start, allowed.number()), end=(self.end, allowed.number()))

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` in [0, 1]."""
        return (1 - fraction) * self.start + fraction * self.end


@dataclass(frozen=True)
class cosine:  # noqa: N801
    """A schedule from ``start`` to ``end``: end + (start − end) · (1 + cos πf) / 2.

    f is the fraction done. Equation 5 of Loshchilov and Hutter, arXiv 1608.03983, without restarts.

    Raises:
        ConfigurationError: ``start`` or ``end`` is no finite number of at least 0.

    >>> round(cosine(1.0, 0.0)(0.25), 4)
    0.8536
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        allowed.check(start=(self.start, allowed.number()), end=(self.end, allowed.number()))

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` in [0, 1]."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class warmup:  # noqa: N801
    """A schedule that rises from 0 over the first part of a training, and then follows another.

    f / w · then(0) up to the fraction w, then((f − w) / (1 − w)) from there on (the gradual warmup
    of Goyal et al., arXiv 1706.02677, section 2.2). The first meta-iteration has 0.

    Args:
        then: a number, or a schedule that is stretched over what is left.
        part: w, above 0 and below 1.

    Raises:
        ConfigurationError: ``part`` is outside, or ``then`` is neither.

    >>> schedule = warmup(linear(1.0, 0.0), 0.2)
    >>> [schedule(fraction) for fraction in (0.1, 0.2, 0.6)]
    [0.5, 1.0, 0.5]
    """

    then: float | Schedule
    part: float

    def __post_init__(self) -> None:
        then = allowed.number() if not callable(self.then) else allowed.code("(fraction)")
        allowed.check(then=(self.then, then), part=(self.part, _part))

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` in [0, 1]."""
        rising = fraction < self.part
        along = 0.0 if rising else (fraction - self.part) / (1 - self.part)
        value = self.then(along) if callable(self.then) else self.then
        return value * fraction / self.part if rising else value


def _part(value: Any) -> Any:
    """Take a part of a whole."""
    if isinstance(value, Real) and 0 < float(value) < 1:
        return value
    raise allowed.Refused("a number above 0 and below 1, such as 0.1")


# Those that a checkpoint can hold as data.
KNOWN = {kind.__name__: kind for kind in (linear, cosine, warmup)}


def value_at(
    schedule: float | Schedule, fraction: float, argument: str = "meta_step_size"
) -> float:
    """Return the value at the fraction done, checking what the user's schedule gives.

    Args:
        schedule: a number, or a callable of the fraction.
        fraction: in [0, 1].
        argument: what it is called, for the error.

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
                f"the schedule {argument} gave {value!r} at the fraction {fraction:.4g}: "
                "it must give a finite number of at least 0"
            ]
        )
    return number
