"""Long trainings in processes of their own, stopped from outside; see faults.py."""

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import long_run
from forked import CONTEXT
from koi import Koi
from koi.training import past
from toys import small_net, snapshot

_draw = random.SystemRandom()

LENGTH = 200  # meta-iterations of a long run


def run_long(folder: Path, seen) -> None:
    """Train in a process of its own, which is to be stopped from outside."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    past._BLOCK = 20  # so that a history has a file of its own soon
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # tracebacks that are meant to be
    koi, tasks = long_run.make()

    def tell(koi, record):
        seen.value = record.iteration

    options = {"checkpoint_every": 1, "resume": True, "log_dir": folder}
    koi.train(tasks, callbacks=[tell], checkpoint_dir=folder, **options)


def stopped(folder: Path, stop: Callable[[int], None]) -> tuple[int | None, int]:
    """Start a training, or let it go on, and stop it at some moment.

    Returns its exit code, None if it has not ended, and the last meta-iteration that was seen.
    """
    seen = CONTEXT.RawValue("i", -1)
    process = CONTEXT.Process(target=run_long, args=(folder, seen))
    process.start()
    while seen.value < 0 and process.is_alive():
        time.sleep(0.002)
    time.sleep(_draw.uniform(0, 0.2))
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself, or by the first
        stop(process.pid)
    process.join(60)
    return process.exitcode, seen.value


def long_ends() -> dict:
    koi, tasks = long_run.make()
    koi.train(tasks)
    return snapshot(koi.model)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def stops(times: int, stop: Callable[[int], None], codes: set[int], saves: bool) -> int:
    """Stop trainings again and again; each goes on, to its end, and another begins."""
    end, lost = long_ends(), 0
    folder = None
    for _ in range(times):
        folder = folder or Path(tempfile.mkdtemp())
        code, seen = stopped(folder, stop)
        newest = max(folder.glob("iteration-*.safetensors"), default=None)
        reached = 0 if newest is None else Koi.load(newest, small_net()).iteration
        # what a callback has seen was not yet saved where the process was killed
        lost += code not in codes or reached < seen + saves
        if reached > 0.8 * LENGTH or _draw.random() < 0.1:
            lost += not ends_well(folder, end)
            folder = None
    if folder is not None:
        lost += not ends_well(folder, end)
    return lost


def ends_well(folder: Path, end: dict) -> bool:
    """Let the training go on to its end; return whether φ and the log are as they must be."""
    learner, tasks = long_run.make()
    with mock.patch("koi.training.past._BLOCK", 20):
        learner.train(tasks, checkpoint_dir=folder, resume=True, log_dir=folder)
    history = Koi.load(max(folder.glob("iteration-*")), small_net()).history
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    half_written = list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
    good = lines == [vars(record) for record in history] and not half_written
    good &= [record.iteration for record in history] == list(range(LENGTH))
    good &= (folder / "history.f64").exists()
    shutil.rmtree(folder)
    return good and same(snapshot(learner.model), end)


def killed(times: int) -> int:
    """kill -9 at random moments."""
    return stops(times, lambda pid: os.kill(pid, signal.SIGKILL), {-9, 0}, saves=False)


def terminated(times: int) -> int:
    """Up to 20 SIGTERMs, close upon each other."""

    def storm(pid: int) -> None:
        for _ in range(_draw.randint(1, 20)):
            os.kill(pid, signal.SIGTERM)
            time.sleep(_draw.uniform(0, 0.002))

    return stops(times, storm, {143, 0, -15}, saves=True)


def interrupted(times: int) -> int:
    """Up to 5 times Ctrl-C, close upon each other."""

    def storm(pid: int) -> None:
        for _ in range(_draw.randint(1, 5)):
            os.kill(pid, signal.SIGINT)
            time.sleep(_draw.uniform(0, 0.01))

    return stops(times, storm, {1, 0, -2}, saves=False)
