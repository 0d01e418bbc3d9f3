"""The folder of a training's checkpoints: named by meta-iteration, the last two kept."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from koi import files
from koi.configured import Configured
from koi.errors import CheckpointError, ConfigurationError
from koi.settings import check_count
from koi.training import checkpoint
from koi.training.checkpoint import Saved
from koi.training.lock import Lock
from koi.training.past import NAME, Past
from koi.training.state import Owed, TrainingState
from koi.training.watch import warn

_KEPT = 2
_BEGUN = "begun.jsonl"
_BEGINNINGS = ".iteration-", f".{_BEGUN}."  # of files that were never completed


class Folder:
    """Finds and names the files; nothing is read or written before `prepare`.

    From then to the end of a block it is locked: no other training can use it.

    Args:
        path: where they lie.
    """

    _suffix = ".safetensors"
    _other_suffix, _kind, _other_kind = ".shards", "whole", "sharded"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock(path)
        self.past = Past(path / NAME)
        self._damaged: set[int] = set()
        self._asked: dict[str, str] = {}
        self.newest: int | None = None  # read or written in this training
        self.owed: Owed | None = None  # by what is in it

    @classmethod
    def given(
        cls, path: str | os.PathLike[str] | None, every: int | None, resume: bool
    ) -> Folder | None:
        """Return the folder that `koi.Koi.train` was given; None where it was given none.

        Raises:
            ConfigurationError: its arguments make no sense together.
        """
        if path is None and (every is not None or resume):
            name = "resume" if resume else "checkpoint_every"
            raise ConfigurationError([f"{name} was given without checkpoint_dir: give both"])
        if every is not None:
            check_count("checkpoint_every", every)
        if path is None:
            return None
        folder = cls(Path(path).absolute())  # a callback may change the current folder
        folder._asked = {"checkpoint_every": str(every), "resume": str(resume)}
        return folder

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def in_words(self) -> dict[str, str]:
        """Return what all ranks must have been given alike."""
        return {}

    @property
    def first_line(self) -> Path | None:
        """Where the log's first line is kept until there is a checkpoint, which tells it then."""
        return self._path / _BEGUN if self.newest is None else None

    def file(self, number: int) -> Path:
        """Return where a learner lies with so many meta-iterations behind it."""
        return self._path / f"iteration-{number:09d}{self._suffix}"

    @property
    def best(self) -> Path:
        """Return the file of the best φ that validation has found."""
        return self._path / "best.safetensors"

    def prepare(self) -> None:
        """Make the folder, lock it and try to write there.

        Raises:
            CheckpointError: it cannot be used, another training uses it, or a link lies there in
                the place of a file that Koi writes.
        """
        for name in (NAME, self.best.name, _BEGUN):
            self._check_no_link(self._path / name)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            trial = files.temporary_name(self.file(0))
            trial.write_bytes(b"")
            trial.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir {self._path} cannot be written to ({error.strerror or error}): "
                "choose another folder"
            ) from error
        if any(self._path.glob(f"iteration-*{self._other_suffix}")):
            raise CheckpointError(
                f"checkpoint_dir {self._path} holds checkpoints of a model that is "
                f"{self._other_kind}, and this one is {self._kind}: choose another folder, or make "
                "the model as it was"
            )

    def check_unused(self, iteration: int) -> None:
        """Check that a learner of so many meta-iterations would overwrite nothing.

        Raises:
            CheckpointError: a training that is further lies there.
        """
        ahead = [number for number in self._numbers() if number >= iteration]
        if ahead and (iteration == 0 or ahead[-1] > iteration):
            raise CheckpointError(
                f"checkpoint_dir {self._path} holds an earlier training, up to meta-iteration "
                f"{ahead[-1]}: give resume=True to go on with it, or another folder"
            )

    def save(self, koi: Configured, state: TrainingState, number: int) -> None:
        """Write the file of a learner with so many meta-iterations behind it.

        Raises:
            CheckpointError: it cannot be written, or is a link.
        """
        self._check_no_link(self.file(number))
        checkpoint.save(koi, state, self.file(number), self.past)

    def read(self, _: Configured, number: int) -> Saved:
        """Read the checkpoint of a learner with so many meta-iterations behind it.

        Raises:
            CheckpointError: it cannot be read.
        """
        return checkpoint.read(self.file(number))

    def newest_good(self, koi: Configured, iteration: int) -> Saved | None:
        """Return the newest checkpoint that can be read, of those that are not behind.

        Raises:
            CheckpointError: there are some, and none can be read, at the very beginning.
        """
        ahead = [number for number in self._listed() if number >= iteration]
        for number in reversed(ahead):
            try:
                saved = self.read(koi, number)
            except CheckpointError as error:
                self._damaged.add(number)
                warn(f"{error}; looking for one")
                continue
            self.newest, self.owed = number, saved.owed
            return saved
        if ahead and iteration == 0:
            raise CheckpointError(
                f"none of the {len(ahead)} checkpoints in {self._path} can be used: to train from "
                "the beginning, choose another folder or empty this one"
            )
        return None

    def remove_old(self) -> None:
        """Remove all but the last two good files up to the newest, and what was never completed."""
        newest = self.newest or 0
        numbers = [number for number in self._numbers() if number <= newest]
        good = [number for number in numbers if number == newest or number not in self._damaged]
        kept = {self.file(number).name for number in good[-_KEPT:]}
        with contextlib.suppress(OSError):
            for path in list(self._path.iterdir()):
                begun = path.suffix == ".tmp" and path.name.startswith(_BEGINNINGS)
                old = self._number_of(path) is not None and path.name not in kept
                if begun or old or path.name == _BEGUN:
                    self._remove(path)

    def _check_no_link(self, path: Path) -> None:
        """Check that what is written there stays in the folder."""
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link, and Koi writes through none among checkpoints: put the file "
                "itself there, or make the whole folder a link"
            )

    def _remove(self, path: Path) -> None:
        path.unlink()

    def _listed(self) -> list[int]:
        """Return the meta-iterations of which there are checkpoints, as all that train see them."""
        return self._numbers()

    def _numbers(self) -> list[int]:
        """Return the meta-iterations of which there are checkpoints, in order."""
        found = map(self._number_of, self._path.iterdir())
        return sorted(number for number in found if number is not None)

    def _number_of(self, path: Path) -> int | None:
        """Return which checkpoint this is; None: none."""
        match = re.fullmatch(rf"iteration-(\d+){re.escape(self._suffix)}", path.name)
        return int(match[1]) if match else None
