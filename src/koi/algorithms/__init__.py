"""The algorithms, a file each: what a task gives, and how φ moves by the mean of that."""

from __future__ import annotations

from typing import Any

from koi.algorithms.base import Adaptation, AgainstGradient, Algorithm, TowardsPoint, given
from koi.algorithms.eigen_reptile import EigenReptile
from koi.algorithms.fomaml import FOMAML
from koi.algorithms.maml import MAML
from koi.algorithms.reptile import Reptile
from koi.allowed import Refused
from koi.errors import ConfigurationError, did_you_mean
from koi.phi.schedules import Schedule

__all__ = [
    "FOMAML",
    "MAML",
    "NAMED",
    "Adaptation",
    "AgainstGradient",
    "Algorithm",
    "EigenReptile",
    "Reptile",
    "TowardsPoint",
    "algorithm_of",
    "given",
    "named",
    "schedule_of",
]

# What the argument ``algorithm`` of `koi.Koi` may be called.
NAMED: dict[str, Algorithm] = {
    "reptile": Reptile(),
    "fomaml": FOMAML(),
    "maml": MAML(),
    "eigen-reptile": EigenReptile(),
}


def algorithm_of(given: str | Algorithm) -> Algorithm:
    """Return the algorithm of a name, or the one that was given.

    Raises:
        ConfigurationError: there is none of this name.

    >>> algorithm_of("maml"), algorithm_of(Reptile())
    (MAML(), Reptile())
    """
    if isinstance(given, str) and given not in NAMED:
        known = ", ".join(map(repr, NAMED))
        raise ConfigurationError([f"algorithm = {given!r}: must be one of {known}"])
    return NAMED[given] if isinstance(given, str) else given


def named(algorithm: Algorithm) -> str:
    """Return how a user writes an algorithm, for messages.

    >>> named(MAML())
    "'maml'"
    """
    names = (
        repr(name)
        for name, known in NAMED.items()
        if type(known) is type(algorithm) and known == algorithm
    )
    return next(names, repr(algorithm))


def schedule_of(
    meta_step_size: float | Schedule | None, algorithm: str | Algorithm, step_size: float
) -> float | Schedule:
    """Return ε as it was given, or what is right for the algorithm where it was not.

    >>> schedule_of(None, "reptile", step_size=0.02), schedule_of(None, "maml", step_size=0.02)
    (linear(start=1.0, end=0.0), 0.02)
    """
    if meta_step_size is not None:
        return meta_step_size
    return algorithm_of(algorithm).default_meta_step_size(step_size)


def checked(value: Any) -> Any:
    """Take an algorithm or its name, as the setting.

    Raises:
        Refused: it is neither.
    """
    if isinstance(value, str) and value in NAMED:
        return value
    if not isinstance(value, Algorithm):
        options = ", ".join(map(repr, NAMED))
        near = did_you_mean(value, NAMED)
        raise Refused(f"one of {options}, or an object such as koi.algorithms.Reptile(){near}")
    kind = type(value).__name__
    if "__dataclass_params__" not in vars(type(value)):
        raise Refused(f"data: put @dataclass(frozen=True) above the class {kind}")
    if value.second_order and not value.query_gradient:
        raise Refused(f"consistent: {kind}.second_order is True, so make query_gradient True, too")
    return value
