"""The progress bar of a training: loss and ε on a terminal, silence everywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tqdm import tqdm

from koi.records import Record


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

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
