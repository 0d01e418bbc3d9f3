"""How a network's scores are read: probabilities that hold, and whether it is none of the classes.

What a softmax says of a drawing that is of no class is as sure as ever. Two signs tell: how far the
highest score leads, and how far the drawing lies from all examples, as an angle between features.
`benchmarks/calibrate.py` fits both on validation characters, for each number of steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from koi.errors import DataError
from koi.files import content_of

_MAX_BYTES = 2**24

# Of each initialisation, how to read scores before the first step and after each.
Readings = dict[str, list["Reading"]]


@dataclass(frozen=True)
class Reading:
    """How scores after a number of steps are read.

    Args:
        temperature: scores are divided by it (Guo et al., arXiv 1706.04599).
        offset, lead, distance: of a logistic regression on the two `signs`, whether a drawing is
            of one of the classes.

    >>> import torch
    >>> reading = Reading(temperature=2.0, offset=1.0, lead=0.5, distance=-3.0)
    >>> reading.probabilities(torch.tensor([0.0, math.log(9)]))
    tensor([0.2500, 0.7500])
    >>> round(reading.known(lead=4.0, distance=1.0), 3)
    0.5
    """

    temperature: float
    offset: float
    lead: float
    distance: float

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probability of each class, given that it is one of them."""
        return (scores / self.temperature).softmax(dim=-1)

    def known(self, lead: float, distance: float) -> float:
        """Return the probability that it is one of the classes."""
        odds = self.offset + self.lead * lead + self.distance * distance
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, odds))))


def signs(scores: Tensor, features: Tensor) -> tuple[float, float]:
    """Return how far the highest score leads, and how far the drawing is from the nearest example.

    Args:
        scores: of the drawing, shape (num_classes,).
        features: what the last layer is given, of the examples and, in the last row, of the
            drawing; shape (num_classes + 1, num_features).

    Returns:
        The difference of the two highest scores; 1 − the largest cosine of the drawing's features
        and an example's, from 0 to 2.

    >>> import torch
    >>> signs(torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]))
    (2.0, 0.0)
    """
    first, second = scores.topk(2).values.tolist()
    cosines = F.cosine_similarity(features[-1:], features[:-1])
    return first - second, 1 - float(cosines.max())


def write(path: Path, checkpoint: Path, readings: Readings, **facts: str) -> None:
    """Write how the scores of a checkpoint are read, and which file that is."""
    rows = {name: [list(vars(each).values()) for each in part] for name, part in readings.items()}
    content = {**facts, "sha256": _digest(checkpoint), "readings": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def readings_of(checkpoint: Path) -> Readings | None:
    """Return how a checkpoint's scores are read, from the .json beside it.

    None where there is none, or it is of another checkpoint.

    Raises:
        DataError: it is of this one, and no such numbers are in it.
    """
    beside = checkpoint.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        content = json.loads(content_of(beside, _MAX_BYTES))
        if content["sha256"] != _digest(checkpoint):
            return None
        rows: dict[str, Sequence[Sequence[float]]] = content["readings"]
        return {name: [Reading(*map(_finite, row)) for row in part] for name, part in rows.items()}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{beside} holds no readings of {checkpoint} ({type(error).__name__}: {error}): write "
            "it anew by benchmarks/calibrate.py, or remove it"
        ) from error


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return float(value)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
