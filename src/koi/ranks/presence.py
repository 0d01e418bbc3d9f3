"""Which ranks are there, told through the store by which they find each other: with any backend.

What torch has is gloo's alone, or a timeout of half an hour: its `monitored_barrier` needs
connections that are closed once a collective has failed, and on a group made for it none but rank 0
would hear which ranks are missing.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from koi.errors import ConfigurationError, RankError, wrong

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Where a collective has failed: seconds in which the ranks may say that they are there.
ROLL_CALL = 5.0
# How long they may take to come to a first training, if the environment does not name a time.
_SECONDS, _VARIABLE = 60.0, "KOI_RANKS_SECONDS"
_PAUSE = 0.02


def patience() -> float:
    """Return the seconds in which all ranks must have come to a first training.

    Raises:
        ConfigurationError: the environment names no number.
    """
    given = os.environ.get(_VARIABLE, str(_SECONDS))
    try:
        return float(given)
    except ValueError:
        raise ConfigurationError([wrong(_VARIABLE, given, "a number of seconds")]) from None


def not_there(ranks: Iterable[int]) -> RankError:
    """Return the error of those who wait for ranks that do not come."""
    named = ", ".join(map(str, sorted(ranks)))
    return RankError(
        f"no news of rank {named} for {patience():g} seconds: has its script ended before "
        f"koi.train? If it only prepares for longer, set {_VARIABLE} to more seconds"
    )


class Presence:
    """Tells the others that this rank is there, and finds out which of them are not.

    Args:
        rank: this one's.
        size: how many there are.
        store: by which they find each other.
    """

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self._rank, self._size, self._store = rank, size, store
        self._who: dict[int, str] = {}
        self._training = 0
        self._count = 0  # collectives so far

    def meet(self, settings: Mapping[str, str]) -> None:
        """Wait until all ranks are at the beginning of a training, and compare settings.

        Whoever was there before is waited for as long as its process lives; it may measure.

        Raises:
            RankError: a rank has ended, or never came.
            ConfigurationError: settings differ; they are named, on all ranks.
        """
        number = self._store.add(f"koi/trainings/{self._rank}", 1)
        me = json.dumps([_machine(), os.getpid()])
        self._training = number
        if number == 1:
            atexit.register(_say_goodbye, self._store, me)
        self._store.set(f"koi/{number}/{self._rank}", json.dumps([me, dict(settings)]))
        before = {other: self._heard(number - 1, other) for other in range(self._size)}
        known = {other: heard[0] for other, heard in before.items() if heard is not None}
        found: dict[int, Mapping[str, str]] = {}
        until = time.monotonic() + patience()
        while missing := set(range(self._size)) - set(found):
            for other in missing:
                heard = self._heard(number, other)
                if heard is not None:
                    self._who[other], found[other] = heard
            ended = [other for other in missing & known.keys() if self._has_ended(known[other])]
            if ended:
                raise RankError(f"{_named(ended)} has ended, and does not come to koi.train again")
            if time.monotonic() > until and missing - found.keys() - known.keys():
                raise not_there(missing - found.keys() - known.keys())
            time.sleep(0 if len(found) == self._size else _PAUSE)
        _compare(found)

    def at_collective(self) -> None:
        """Note that this rank goes to another collective."""
        self._count += 1

    def missing(self) -> str:
        """Return which ranks are not at the collective that failed.

        NCCL ends the process, unless told not to, before this is reached.
        """
        here, until = f"koi/collective/{self._count}/", time.monotonic() + ROLL_CALL
        try:
            self._store.set(f"{here}{self._rank}", "")
            while True:
                # at once, where it can be seen: whoever started the ranks may end them soon
                gone = [rank for rank, who in self._who.items() if self._has_ended(who)]
                if gone:
                    return f"{_named(gone)} has ended"
                absent = [n for n in range(self._size) if not self._store.check([f"{here}{n}"])]
                if not absent:
                    return "all ranks are there, so the connection between them was cut"
                if time.monotonic() > until:
                    named = _named(absent)
                    return f"{named} did not get here, so it hangs, has ended, or is cut off"
                time.sleep(_PAUSE)
        except (RuntimeError, ValueError):
            return "the store through which ranks find each other is gone too"

    def is_done(self, *error: str) -> None:
        """Say that this rank is done with its tasks, or that it left: with what error and text."""
        with suppress(RuntimeError):  # the store is gone too, as the next collective will find
            said = json.dumps([self._training, self._count, error])
            self._store.set(f"koi/done/{self._rank}", said)

    def company(self, ranks: Iterable[int]) -> tuple[list[int], dict[int, list[str]]]:
        """Return which ranks are not done with the tasks of now, and with what others have left.

        They may take some seconds to say so; those that have ended are at nothing any more.
        """
        until = time.monotonic() + ROLL_CALL
        try:
            while True:
                said = {rank: self._said(rank) for rank in ranks}
                left = {rank: why for rank, why in said.items() if why}
                away = [rank for rank, why in said.items() if why is None]
                away = [rank for rank in away if not self._has_ended(self._who[rank])]
                if left or not away or time.monotonic() > until:
                    return away, left
                time.sleep(_PAUSE)
        except (RuntimeError, ValueError):
            return [], {}

    def _said(self, rank: int) -> list[str] | None:
        """Return the error with which a rank has left the tasks of now, empty if it is done."""
        key = f"koi/done/{rank}"
        if not self._store.check([key]):
            return None
        *when, error = json.loads(self._store.get(key))
        return list(error) if when == [self._training, self._count] else None

    def _heard(self, number: int, rank: int) -> tuple[str, Mapping[str, str]] | None:
        key = f"koi/{number}/{rank}"
        if number < 1 or not self._store.check([key]):
            return None
        who, settings = json.loads(self._store.get(key))
        return who, settings

    def _has_ended(self, who: str) -> bool:
        """Return whether a process has said that it ends or, on this machine, is no more."""
        machine, process = json.loads(who)
        if self._store.check([f"koi/left/{who}"]):
            return True
        return bool(machine == _machine()) and not _lives(process)


def _compare(settings: Mapping[int, Mapping[str, str]]) -> None:
    """Check that all ranks have the same settings.

    Raises:
        ConfigurationError: they have not.
    """
    first = settings[0]
    problems = [
        f"{name}: {first.get(name)} on rank 0, {others.get(name)} on rank {rank}; make it the same "
        "on all ranks"
        for rank, others in sorted(settings.items())
        for name in dict.fromkeys((*first, *others))
        if first.get(name) != others.get(name)
    ]
    if problems:
        raise ConfigurationError(problems)


def _named(ranks: Iterable[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)


def _machine() -> list[str]:
    """Return what tells where numbers of processes mean the same."""
    spaces = ""
    with suppress(OSError):
        spaces = os.readlink("/proc/self/ns/pid")
    return [socket.gethostname(), spaces]


def _lives(process: int) -> bool:
    """Return whether a process of this machine runs; one that waits to be buried does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        if Path("/proc/self/stat").exists():
            return stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(process, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


def _say_goodbye(store: Store, who: str) -> None:
    with suppress(Exception):  # the store may have ended first
        store.set(f"koi/left/{who}", "")


def gathered(
    store: Store, names: Callable[[int], str], ranks: Iterable[int], answer: Callable[[int], None]
) -> None:
    """Wait until each rank has set its name in the store, letting ``answer`` do its part.

    Raises:
        RankError: one does not.
    """
    missing, until = set(ranks), time.monotonic() + patience()
    while missing:
        for other in list(missing):
            answer(other)
            if store.check([names(other)]):
                missing.discard(other)
        if missing and time.monotonic() > until:
            raise not_there(missing)
        time.sleep(_PAUSE)
