"""The algorithms, a file each: what a task gives, and how φ moves by the mean of that."""

from __future__ import annotations

from koi.algorithms.base import Adaptation, AgainstGradient, Algorithm, TowardsPoint, given
from koi.algorithms.eigen_reptile import EigenReptile
from koi.algorithms.fomaml import FOMAML
from koi.algorithms.maml import MAML
from koi.algorithms.reptile import Reptile
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

    >>> algorithm_of("maml"), algorithm_of(Reptile())
    (MAML(), Reptile())
    """
    return NAMED[given] if isinstance(given, str) else given


def named(algorithm: Algorithm) -> str:
    """Return how a user writes an algorithm, for messages.

    >>> named(MAML())
    "'maml'"
    """
    names = (repr(name) for name, known in NAMED.items() if known == algorithm)
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
