"""What the files of a run's folder may hold; whoever edits them is told what is wrong where."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koi import allowed
from koi.errors import ConfigurationError
from koi.files import content_of

# Bytes of a file of a run: the classes of a large data set take some.
MAX_BYTES = 2**26
MEND = "put it back as it was, or choose another folder"

_NUMBERS = [[one, other] for one in (int, float) for other in (int, float)]

parts = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and set(value) == {"train", "validation", "test"}
        and all(
            isinstance(names, list) and all(isinstance(name, str) and name for name in names)
            for names in value.values()
        )
    ),
    'the names of classes in "train", "validation" and "test"',
)
_pair = allowed.that(
    lambda value: (
        isinstance(value, list)
        and [type(number) for number in value] in _NUMBERS
        and 0 <= value[0] <= 1
        and not value[1] < 0  # of a single task it is not a number
    ),
    "a mean and the half-width of its interval, in [0, 1]",
)


@dataclass(frozen=True)
class Result:
    """What was measured with so many shots, as results.json keeps it.

    Args:
        transductive: mean and half-width of its 95 % interval, in [0, 1].
        inductive: likewise.
        num_tasks: how many tasks they are over.
        iteration: meta-iterations of the learner.
        num_skipped: tasks that were left out as not finite.
        seconds: that it took.
    """

    transductive: list[float] = allowed.of(_pair)
    inductive: list[float] = allowed.of(_pair)
    num_tasks: int = allowed.of(allowed.count(1))
    iteration: int = allowed.of(allowed.count(0))
    num_skipped: int = allowed.of(allowed.count(0), 0)
    seconds: float = allowed.of(allowed.number(), 0.0)

    def __post_init__(self) -> None:
        allowed.check_fields(self)


def read(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file of JSON.

    Raises:
        OSError: the file cannot be read.
        ConfigurationError: it holds something else.
    """
    content = content_of(path, MAX_BYTES)
    try:
        data = json.loads(content)
    except (RecursionError, ValueError) as error:
        raise ConfigurationError([f"{path} is no JSON ({error}): {MEND}"]) from error
    if not isinstance(data, dict):
        raise ConfigurationError([f"{path} holds no dictionary: {MEND}"])
    return data


shots = allowed.that(
    lambda value: isinstance(value, str) and value.isdecimal() and 0 < int(value[:9]) < 10**6,
    "a number of shots",
)
measured = allowed.that(
    lambda value: (
        isinstance(value, dict)
        and type(value.get("iteration")) is int
        and all(
            isinstance(number, int | float | None) and re.fullmatch(r"iteration|\d+-shot \w+", name)
            for name, number in value.items()
        )
    ),
    "a measurement",
)
