"""The history of a training on disk: a checkpoint holds the end of it, a file beside it the rest.

What a save writes is then the same after a thousand meta-iterations and after a million. The file
only grows. A checkpoint knows how many of its records are before its own, and their checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from koi import memory
from koi.errors import CheckpointError
from koi.files import replace_file
from koi.records import COLUMNS, ROW, History, Record
from koi.training.watch import warn

NAME = "history.f64"

# Records: a checkpoint holds the last one or two thousand.
_BLOCK = 1000


class Past:
    """The file of a training's older records.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0  # records of this training that are known to be there
        self._digest = hashlib.sha256()

    def take(self, history: History) -> tuple[int, str]:
        """Let the file hold what a checkpoint need not; return how many records, and a checksum.

        Raises:
            CheckpointError: it cannot be written.
        """
        due = max(0, len(history) // _BLOCK - 1) * _BLOCK
        if due < self._count:  # somebody has cleared it
            self._count, self._digest = 0, hashlib.sha256()
        try:
            if due > self._count:
                self._write(history.rows(self._count, due))
                self._count = due
        except OSError as error:
            raise CheckpointError(
                f"the history {self._path} cannot be written ({error.strerror or error}): φ "
                "and checkpoints are as they were; make room or choose another folder, and go on"
            ) from error
        return self._count, self._digest.hexdigest()

    def _write(self, rows: bytes) -> None:
        """Append rows, which reach the disk before a checkpoint counts on them."""
        if self._count == 0:
            self._begin(rows)
        else:
            with self._path.open("r+b") as file:
                file.seek(self._count * ROW)
                file.write(rows)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        self._digest.update(rows)

    def _begin(self, rows: bytes) -> None:
        """Let the file begin with rows; one that goes on as they do stays, any other goes aside."""
        there = b""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            there = file.read(len(rows))
        if there == rows:
            return
        if there and not rows.startswith(there):
            self._path.replace(self._path.with_name(f"{NAME}.old"))
        replace_file(self._path, rows)


def stored_history(history: History, past: Past | None) -> dict[str, Any]:
    """Return a history as a checkpoint holds it: wholly, or its end, where a file has the rest."""
    before, digest = (0, "") if past is None else past.take(history)
    rows = bytearray(history.rows(before, len(history)))
    values = torch.frombuffer(rows, dtype=torch.float64) if rows else torch.tensor([]).double()
    return {
        "columns": list(COLUMNS),
        "rows": values.reshape(-1, len(COLUMNS)),
        "before": before,
        "sha256": digest,
    }


def history_from(data: Mapping[str, Any], path: Path | str) -> History:
    """Return the history that `stored_history` gave, or an earlier Koi did.

    Args:
        data: what it gave.
        path: the checkpoint, beside which the file lies.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is none.
    """
    if "rows" not in data:  # a tensor for each column
        return _of_rows(list(data), zip(*(c.tolist() for c in data.values()), strict=True))
    columns, values = data["columns"], data["rows"]
    fits = values.dtype == torch.float64 and values.shape == (len(values), len(columns))
    if not (fits and data["before"] >= 0):
        raise ValueError("it has no such rows")
    rows = b"".join(memory.pieces_of(values))
    if data["before"]:
        rows = _earlier(data, Path(path)) + rows
    if columns == list(COLUMNS):
        return History.of(rows)
    numbers = iter(array("d", rows))
    return _of_rows(columns, zip(*[numbers] * len(columns), strict=True))


def _of_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> History:
    return History(Record(**dict(zip(columns, row, strict=True))) for row in rows)


def _earlier(data: Mapping[str, Any], path: Path) -> bytes:
    """Return the rows before those of a checkpoint; none, with a warning, where they are lost."""
    file, size = path.with_name(NAME), data["before"] * 8 * len(data["columns"])
    with contextlib.suppress(OSError):
        if file.is_file() and file.stat().st_size >= size:
            with file.open("rb") as opened:
                rows = opened.read(size)
            if hashlib.sha256(rows).hexdigest() == data["sha256"]:
                return rows
    warn(
        f"{file} is not there, or not as it was, with the first {data['before']} records of the "
        f"history of {path}: koi.history begins after them; nothing else is missing"
    )
    return b""
