"""What is seen of a long training: a line for each meta-iteration, and TensorBoard's curves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from koi.errors import ConfigurationError
from koi.records import Record
from koi.storage import replace_file
from koi.watch import warn

METRICS = "metrics.jsonl"

# Seconds that a record may wait before it reaches its file.
_PATIENCE = 5.0
# TensorBoard shows 1,000 points of a curve: of a longer training it gets means, as many at least.
_POINTS = 1000


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add what was measured at a meta-iteration to a JSONL file, as a callback may do.

    Lines of this and later meta-iterations, which a killed training had written before it went on
    from an earlier checkpoint, and a last line that is not whole, are taken out: the curve goes on
    without a seam. The file is replaced as one, so this is for hundreds of lines, not millions.

    Args:
        path: the file, made if it is missing.
        line: numbers and strings, among them ``"iteration"``.

    Raises:
        OSError: the file cannot be written; it is as it was before.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "validation.jsonl"
    ...     for iteration in (0, 100, 200, 100):
    ...         append(path, {"iteration": iteration, "accuracy": 0.5})
    ...     print(path.read_text(), end="")
    {"iteration": 0, "accuracy": 0.5}
    {"iteration": 100, "accuracy": 0.5}
    """
    before = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [
        text
        for text in before
        if text.endswith(b"\n") and json.loads(text)["iteration"] < line["iteration"]
    ]
    replace_file(path, [*kept, _encoded([line])])


class Log:
    """Writes ``koi.history`` into a folder as it grows.

    metrics.jsonl is the history: it is written anew where a training begins or goes on, so that
    nothing of a killed one is missing, doubled or cut, and again where it is not as it was left.
    TensorBoard, where it is installed, is told from where on its curves are void.

    A log that cannot be written is a warning; the training goes on, and the log once it can.

    Args:
        folder: where to write, made if it is missing; None: nowhere.
        history: the records so far; more are appended to it.
        num_iterations: meta-iterations that there will be.
        resume: a training goes on: what the folder holds is its own.

    Raises:
        ConfigurationError: the folder cannot be written to, or is another training's.
    """

    def __init__(
        self, folder: Any, history: Sequence[Record], num_iterations: int, resume: bool
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._history = history
        self._size: int | None = None  # of the file as it was left; None: not by this training
        self._written = 0
        self._flushed_at = time.monotonic()
        self._failed = False
        self._board: Any = None
        self._drawn = 0  # blocks of meta-iterations that TensorBoard has
        self._stride = max(1, num_iterations // _POINTS)
        if self._folder is not None:
            self._open(self._folder, anew=not history and not resume)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            self._write(self._folder / METRICS)
            self._failed = False
        except OSError as error:
            self._warn(f"{METRICS} cannot be written ({error.strerror or error}): trying again")
            return
        try:
            self._draw()
        except Exception as error:  # whatever its writer thread met
            self._board = None
            self._warn(f"TensorBoard's events cannot be written ({error}): giving them up")

    def _open(self, folder: Path, anew: bool) -> None:
        path = folder / METRICS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if anew and path.exists() and path.stat().st_size:
                raise ConfigurationError(
                    [
                        f"log_dir {folder} holds the log of an earlier training: choose another "
                        "folder, empty this one, or go on from a checkpoint with resume=True"
                    ]
                )
            self._write(path)
        except OSError as error:
            raise ConfigurationError(
                [
                    f"log_dir {folder} cannot be written to ({error.strerror or error}): choose "
                    "another folder"
                ]
            ) from error
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            begun = any(folder.glob("events.out.tfevents.*"))
            done = len(self._history)
            self._drawn = done // self._stride if begun else 0
            self._board = SummaryWriter(folder, purge_step=done if begun else None)

    def _write(self, path: Path) -> None:
        """Append the records that are new, or write all where the file is not as it was left."""
        size = path.stat().st_size if path.exists() else None
        if self._size is None or size != self._size:
            content = _encoded(map(asdict, self._history))
            replace_file(path, [content])
            self._size = len(content)
        elif len(self._history) > self._written:
            content = _encoded(map(asdict, self._history[self._written :]))
            try:
                with path.open("ab") as file:
                    file.write(content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, self._size)
                raise
            self._size += len(content)
        self._written = len(self._history)

    def _draw(self) -> None:
        """Give TensorBoard the mean of each block of meta-iterations that is complete."""
        if self._board is None:
            return
        for block in range(self._drawn, len(self._history) // self._stride):
            step = (block + 1) * self._stride - 1
            records = self._history[step + 1 - self._stride : step + 1]
            for name in _CURVES:
                mean = sum(getattr(record, name) for record in records) / len(records)
                self._board.add_scalar(name, mean, step)
            self._drawn = block + 1
        self._board.flush()

    def _warn(self, what: str) -> None:
        if not self._failed:
            warn(f"log_dir {self._folder}: {what}; the training goes on")
        self._failed = True


_CURVES = tuple(field.name for field in fields(Record) if field.name != "iteration")


def _encoded(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Return strict JSON, a line each; what is not finite has no number in it and becomes null."""
    finite = (
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        for line in lines
    )
    return "".join(json.dumps(line) + "\n" for line in finite).encode()
