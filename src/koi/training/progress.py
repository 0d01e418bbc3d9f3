"""The progress bar of a training: loss and ε on a terminal, silence everywhere else."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from koi.records import Record


class Messages(logging.Handler):
    """Shows what Koi logs above the bar, such as that it compiles and nothing moves for a while.

    Where the program shows log messages itself, that is left to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logger = logging.getLogger("koi")
        self._level = self._logger.level

    def start(self) -> None:
        """Show messages from here on."""
        if not self._logger.hasHandlers():
            self._logger.addHandler(self)
            self._logger.setLevel(logging.INFO)

    def stop(self) -> None:
        """Leave logging as it was."""
        if self in self._logger.handlers:
            self._logger.removeHandler(self)
            self._logger.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message without disturbing the bar."""
        tqdm.write(record.getMessage(), file=sys.stderr)


class ProgressBar:
    """A tqdm bar; with ``show=None`` only where the error stream is a terminal.

    Its ``note`` is shown behind losses and ε.
    """

    def __init__(self, show: bool | None, total: int, done: int) -> None:
        self.note = ""
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=done,
            disable=None if show is None else not show,
            unit="it",
            dynamic_ncols=True,
        )
        self._messages = Messages()

    def __enter__(self) -> ProgressBar:
        if not self._bar.disable:
            self._messages.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._messages.stop()
        self._bar.close()

    def advance(self, record: Record) -> None:
        """Count one meta-iteration and show its losses and ε."""
        if self._bar.disable:
            return
        self._bar.set_postfix_str(
            f"loss {record.loss_before:.3g} → {record.loss_after:.3g}, "
            f"ε {record.meta_step_size:.3g}" + (f", {self.note}" if self.note else ""),
            refresh=False,
        )
        self._bar.update(record.iteration + 1 - self._bar.n)
