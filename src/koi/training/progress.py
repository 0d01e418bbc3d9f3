"""The progress bar of a training: loss and ε on a terminal, silence everywhere else."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import TqdmWarning, tqdm

from koi.records import Record


@contextmanager
def messages() -> Iterator[None]:
    """Show what Koi logs above the bar, such as that it compiles and nothing moves for a while.

    Where the program shows log messages itself, that is left to it.
    """
    logger = logging.getLogger("koi")
    if logger.hasHandlers():
        yield
        return
    with warnings.catch_warnings():  # of a notebook's own bar, which is not asked for
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.contrib.logging import logging_redirect_tqdm
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.setLevel(level)


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
        self._open = ExitStack()
        self._open.callback(self._bar.close)

    def __enter__(self) -> ProgressBar:
        if not self._bar.disable:
            self._open.enter_context(messages())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def advance(self, record: Record) -> None:
        """Count one meta-iteration and show its losses and ε."""
        if self._bar.disable:
            return
        known = not math.isnan(record.loss_before)
        losses = f"loss {record.loss_before:.3g} → {record.loss_after:.3g}, " if known else ""
        self._bar.set_postfix_str(
            f"{losses}ε {record.meta_step_size:.3g}" + (f", {self.note}" if self.note else ""),
            refresh=False,
        )
        self._bar.update(record.iteration + 1 - self._bar.n)
