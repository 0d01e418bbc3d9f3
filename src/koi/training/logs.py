"""What is seen of a long training: a line for each meta-iteration, and TensorBoard's curves."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from koi import allowed
from koi.errors import ConfigurationError
from koi.files import content_of, opened, replace_file, replacing
from koi.records import COLUMNS, History
from koi.training.state import TrainingState
from koi.training.watch import warn
from koi.training.whose import LONGEST, OwnPart, encoded, own_part, pieces

METRICS = "metrics.jsonl"

_MAX_APPENDED = 2**26  # bytes of a file that each line is added to as a whole

# Seconds that a record may wait before it reaches its file.
_PATIENCE = 5.0
# Records that are written at a time.
_SOME = 1000
# TensorBoard shows 1,000 points of a curve: of a longer training it gets means, as many at least.
_POINTS = 1000


def append(path: str | os.PathLike[str], line: Mapping[str, Any]) -> None:
    """Add what was measured at a meta-iteration to a JSONL file, as a callback may do.

    Lines of this and later meta-iterations, which a killed training had written before it went on
    from an earlier checkpoint, are taken out, so that the curve goes on without a seam: into a file
    beside it, whose name ends in ``.old``, since they may be another training's after all. A last
    line that is not whole goes. The file is replaced as one, so this is for hundreds of lines, not
    millions.

    Args:
        path: the file, made if it is missing.
        line: numbers and strings, among them ``"iteration"``.

    Raises:
        ConfigurationError: it holds something else, or ``line`` does; it is as it was before.
        OSError: the file cannot be written, or has more than 64 MiB; it is as it was before.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "validation.jsonl"
    ...     for iteration in (0, 100, 200, 100):
    ...         append(path, {"iteration": iteration, "accuracy": 0.5})
    ...     print(path.read_text(), end="")
    {"iteration": 0, "accuracy": 0.5}
    {"iteration": 100, "accuracy": 0.5}
    """
    allowed.check(path=(path, allowed.path), line=(line, _line))
    path = Path(path)
    before = content_of(path, _MAX_APPENDED).splitlines(keepends=True) if path.exists() else []
    whole = [text for text in before if text.endswith(b"\n")]
    kept: list[bytes] = []
    later: list[bytes] = []
    try:
        for text in whole:
            is_before = json.loads(text)["iteration"] < line["iteration"]
            (kept if is_before else later).append(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            [f"{path} holds lines that are no measurements of a training: choose another file"]
        ) from error
    if later:
        with path.with_name(f"{path.name}.old").open("ab") as file:
            file.writelines(later)
    replace_file(path, b"".join([*kept, encoded([line])]))


_plain = bool | int | float | str | None
_line = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and type(value.get("iteration")) is int
        and all(isinstance(key, str) and isinstance(each, _plain) for key, each in value.items())
    ),
    'a dictionary of numbers and strings, with "iteration", a whole number',
)


class Log:
    """Writes ``koi.history`` into a folder as it grows.

    metrics.jsonl is the history. Where a training goes on it is cut to the lines of what is done,
    so that nothing of a killed one is doubled or cut, and what is missing is added; it is written
    anew where it is not as it was left. All that only where it is of this very training (`own_part`
    says how it is known; ``begun`` holds its first line where there is no checkpoint yet).
    TensorBoard, where it is installed, is told from where on its curves are void.

    A log that cannot be written is a warning; the training goes on, and the log once it can.

    Args:
        folder: where to write, made if it is missing; None: nowhere.
        state: of the training, with the records so far; more are appended to them.
        num_iterations: meta-iterations that there will be.
        resume: a training goes on, and what it wrote before it was killed is replaced.
        begun: a file for the first line, beside the checkpoints of which there is none yet; None:
            there is one, or there will be none.

    Raises:
        ConfigurationError: the folder cannot be written to, or is another training's.
    """

    def __init__(
        self,
        folder: Any,
        state: TrainingState,
        num_iterations: int,
        resume: bool,
        begun: Path | None,
    ) -> None:
        self._folder = None if folder is None else Path(folder).absolute()
        self._state = state
        self._begun = begun
        self._size = 0  # of the file as it was left
        self._written = 0
        self._flushed_at = time.monotonic()
        self._failed = False
        self._board: Any = None
        self._drawn = 0  # blocks of meta-iterations that TensorBoard has
        self._stride = max(1, num_iterations // _POINTS)
        if self._folder is not None:
            self._open(self._folder, resume)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._board is not None:
            with contextlib.suppress(Exception):
                self._board.close()

    def after_iteration(self, at_once: bool) -> None:
        """Write what is new, ``at_once`` or when enough time has passed."""
        if at_once or time.monotonic() - self._flushed_at > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        if self._folder is None:
            return
        self._flushed_at = time.monotonic()
        try:
            self._write(self._folder / METRICS, len(self._state.history))
            self._failed = False
        except OSError as error:
            self._warn(f"{METRICS} cannot be written ({error.strerror or error}): trying again")
            return
        try:
            self._draw()
        except Exception as error:  # whatever its writer thread met
            self._board = None
            self._warn(f"TensorBoard's events cannot be written ({error}): giving them up")

    def _open(self, folder: Path, resume: bool) -> None:
        path, history = folder / METRICS, self._state.history
        # the last record may still be owed what validation gives
        done = len(history) - (self._state.owed is not None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                opened(path).close()  # no pipe, on which all that follows would wait
            there = path.exists() and path.stat().st_size > 0
            if there and not history and not resume:
                raise ConfigurationError(
                    [
                        f"log_dir {folder} holds the log of an earlier training: choose another "
                        "folder, empty this one, or go on from a checkpoint with resume=True"
                    ]
                )
            own = own_part(path, history, done, self._first_line()) if there else OwnPart(0, 0)
            if own is None:
                number = len(history)
                here = f"has done {number} meta-iterations" if number else "has no checkpoint yet"
                raise ConfigurationError(
                    [
                        f"log_dir {folder} holds {_num_lines(path)} lines that this "
                        f"training, which {here}, did not write: choose another folder, or move "
                        f"that {METRICS} away"
                    ]
                )
            with path.open("ab") as file:
                file.truncate(own.size)
            self._size, self._written = own
            self._write(path, done)
        except OSError as error:
            raise ConfigurationError(
                [
                    f"log_dir {folder} cannot be written to ({error.strerror or error}): choose "
                    "another folder"
                ]
            ) from error
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            begun = (there or done) and any(folder.glob("events.out.tfevents.*"))
            self._drawn = done // self._stride if begun else 0
            self._board = SummaryWriter(folder, purge_step=done if begun else None)

    def _first_line(self) -> bytes:
        """Return the line that was put down where there was no checkpoint to hold it."""
        with contextlib.suppress(OSError):
            return b"" if self._begun is None else content_of(self._begun, LONGEST)
        return b""

    def _write(self, path: Path, count: int) -> None:
        """Append what is new of so many records, or write all if the file is not as it was left."""
        history, size = self._state.history, path.stat().st_size if path.exists() else None
        if self._begun is not None and count and not self._written:
            # first: a line in the log without it would be a stranger's to the next process
            replace_file(self._begun, encoded(history[:1]))
        if size != self._size:
            if size and own_part(path, history, count, b"") is None:
                raise OSError("another training writes there")
            with replacing(path) as file:
                self._size = sum(map(file.write, _encoded_parts(history, 0, count)))
            self._written = count
            return
        for content in _encoded_parts(history, self._written, count):
            try:
                with path.open("ab") as file:
                    file.write(content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, self._size)
                raise
            self._size += len(content)
            self._written = min(count, self._written + _SOME)

    def _draw(self) -> None:
        """Give TensorBoard the mean of each complete block of meta-iterations; None is no value."""
        if self._board is None:
            return
        for block in range(self._drawn, len(self._state.history) // self._stride):
            step = (block + 1) * self._stride - 1
            records = self._state.history[step + 1 - self._stride : step + 1]
            for name in _CURVES:
                values = [getattr(record, name) for record in records]
                values = [value for value in values if value is not None]
                if values:
                    self._board.add_scalar(name, sum(values) / len(values), step)
            self._drawn = block + 1
        self._board.flush()

    def _warn(self, what: str) -> None:
        if not self._failed:
            warn(f"log_dir {self._folder}: {what}; the training goes on")
        self._failed = True


_CURVES = tuple(name for name in COLUMNS if name != "iteration")


def _num_lines(path: Path) -> int:
    with opened(path) as file:
        return sum(piece.count(b"\n") for piece in pieces(file))


def _encoded_parts(history: History, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines of records, some at a time."""
    for first in range(start, end, _SOME):
        yield encoded(history[first : min(end, first + _SOME)])
