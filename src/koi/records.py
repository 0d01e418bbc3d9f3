"""What is remembered of each meta-iteration."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload


@dataclass(frozen=True)
class Record:
    """One meta-iteration of a training, an entry of ``koi.history``.

    Args:
        iteration: its number, from 0.
        loss_before: mean over tasks of the loss at the first inner step, thus at φ. Tasks count as
            their ``weight`` says. NaN where tasks have an inner loop of their own.
        loss_after: mean over tasks of the last loss that was computed: at the last inner step,
            before its update (Reptile), or the query loss at φ̃ (FOMAML, MAML). No loss is
            evaluated for the record's sake.
        meta_step_size: ε.
        update_norm: Euclidean norm of the change of φ's parameters.
        seconds: wall time, sampling included.
        num_skipped: tasks left out by ``on_nonfinite="skip"``.
        meta_gradient_norm: Euclidean norm of the meta-gradient, φ − mean(φ̃) or the mean gradient,
            before ``clip_meta``.
        validation: what ``train(validate=…)`` measured after it; None: nothing, or NaN.
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


COLUMNS = tuple(field.name for field in fields(Record))
ROW = 8 * len(COLUMNS)  # bytes
_WHOLE = {COLUMNS.index(name) for name in ("iteration", "num_skipped")}


class History(Sequence[Record]):
    """The records of a training, read like a list; each is a row of float64, of 72 bytes.

    >>> history = History([Record(0, 2.0, 1.0, 0.5, 0.1, 0.01)])
    >>> len(history), history[-1].loss_after, history[0].validation
    (1, 1.0, None)
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._values = array("d")
        for record in records:
            self.append(record)

    @classmethod
    def of(cls, rows: bytes) -> History:
        """Return the history that `rows` gave as bytes."""
        history = cls()
        history._values.frombytes(rows)
        return history

    def rows(self, start: int, end: int) -> bytes:
        """Return records as bytes, from the first to before the last: float64 as in memory."""
        width = len(COLUMNS)
        return self._values[start * width : end * width].tobytes()

    def append(self, record: Record) -> None:
        """Add the record of the next meta-iteration."""
        values = (getattr(record, name) for name in COLUMNS)
        self._values.extend([math.nan if value is None else value for value in values])

    def validated(self, value: float | None) -> None:
        """Put what validation gave into the last record."""
        last = replace(self[-1], validation=value)
        del self._values[-len(COLUMNS) :]
        self.append(last)

    def clear(self) -> None:
        """Forget all."""
        del self._values[:]

    def __len__(self) -> int:
        return len(self._values) // len(COLUMNS)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self._record(number) for number in range(*place.indices(len(self)))]
        return self._record(range(len(self))[place])

    def _record(self, number: int) -> Record:
        width = len(COLUMNS)
        row = self._values[number * width : (number + 1) * width]
        values: list[Any] = [int(v) if i in _WHOLE else v for i, v in enumerate(row)]
        # one and the same object, so that equal records are equal
        values = [math.nan if value != value else value for value in values]
        if math.isnan(values[-1]):
            values[-1] = None
        return Record(*values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, History):
            return self._values.tobytes() == other._values.tobytes()
        return isinstance(other, list) and list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


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
    if total == 0 or not all(losses):
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
