"""Whose log it is: the lines that a training has written itself, told from another's."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from koi.files import opened
from koi.records import History, Record

# Bytes at the end of what is done, a thousand lines or so, by which a log is known.
_END = 2**18
LONGEST = 4096  # bytes of a line, by far


class OwnPart(NamedTuple):
    """The beginning of a log that is a training's own: its bytes, and the records in it."""

    size: int
    records: int


def own_part(path: Path, history: History, count: int, begun: bytes) -> OwnPart | None:
    """Return the lines of a log that hold records of a history; None: it is another training's.

    It is known by its first line and the last thousand of what is done, each of which has its time
    to the nanosecond: no two trainings have one in common. What lies between is not looked at, as a
    log may have a million lines.

    Args:
        path: a log that is not empty.
        history: the records; where the first ones are lost the log may have them.
        count: how many of them the log may hold.
        begun: the first line, where there is no record yet.
    """
    with opened(path) as file:
        first = file.readline(LONGEST)
        if not history or not first.endswith(b"\n"):
            known = begun if not history else encoded(history[:1])
            own = known == first or (known.startswith(first) and not first.endswith(b"\n"))
            return OwnPart(0, 0) if own else None
        number = _iteration_of(first)
        if number is None:
            return None
        lost = history[0].iteration - number
        file.seek(0)
        size, num_lines = _end_of_lines(file, lost + count)
        records = num_lines - lost
        if lost < 0 or records < 0 or (lost and not records):
            return None
        start = max(0, size - _END)
        file.seek(start)
        last = file.read(size - start).splitlines(keepends=True)
    last = last[max(start > 0, len(last) - records) :] if records else []
    pairs = [(first, history[0])] if not lost else []
    pairs += zip(last, history[records - len(last) : records], strict=True)
    return OwnPart(size, records) if all(_is_of(*pair) for pair in pairs) else None


def _iteration_of(line: bytes) -> int | None:
    """Return the number that a line begins with; None: it is no line of a log."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        number = json.loads(line)["iteration"]
        return number if type(number) is int else None
    return None


def _is_of(line: bytes, record: Record) -> bool:
    """Return whether a line is a record's; validation may have come after the one or the other."""
    if line == encoded([record]):
        return True
    try:
        pair = [json.loads(text) | {"validation": None} for text in (line, encoded([record]))]
    except (ValueError, TypeError):
        return False
    return bool(pair[0] == pair[1])


def _end_of_lines(file: Any, count: int) -> tuple[int, int]:
    """Return where so many lines end, or all whole ones if there are fewer, and their number."""
    size = found = read = 0
    for piece in pieces(file):
        if found >= count:
            break
        number = piece.count(b"\n")
        if found + number > count:
            number = count - found
            piece = b"".join(piece.splitlines(keepends=True)[:number])
        if number:
            size = read + piece.rfind(b"\n") + 1
        found, read = found + number, read + len(piece)
    return size, found


def pieces(file: Any) -> Iterator[bytes]:
    """Yield what is left of a file, a piece at a time, however long its lines are."""
    return iter(lambda: file.read(2**20), b"")


def encoded(lines: Iterable[Record | Mapping[str, Any]]) -> bytes:
    """Return strict JSON, a line each; what is not finite has no number in it and becomes null."""
    finite = (
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in (vars(line) if isinstance(line, Record) else line).items()
        }
        for line in lines
    )
    return "".join(json.dumps(line) + "\n" for line in finite).encode()
