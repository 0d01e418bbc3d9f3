"""Trainings that meet: two processes in one folder, two threads in one process; see faults.py."""

import logging
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import faults_long
from forked import CONTEXT
from koi import CheckpointError, Koi
from test_randomness import Noisy, dropout_net, reseed
from toys import snapshot

_draw = random.SystemRandom()
_REFUSED = 75


def run_or_say(folder: Path, seen) -> None:
    try:
        faults_long.run_long(folder, seen)
    except CheckpointError as error:
        sys.exit(_REFUSED if "in use by another training (process " in str(error) else 1)


def in_one_folder(times: int) -> int:
    """Two processes start in the same folder at about the same time; sometimes one is killed."""
    end, lost = faults_long.long_ends(), 0
    for number in range(times):
        folder, seen = Path(tempfile.mkdtemp()), CONTEXT.RawValue("i", -1)
        pair = [CONTEXT.Process(target=run_or_say, args=(folder, seen)) for _ in range(2)]
        for process in pair:
            process.start()
            time.sleep(_draw.uniform(0, 0.3))
        if number % 3 == 0:
            pair[0].kill()
        for process in pair:
            process.join()
        codes = sorted(process.exitcode for process in pair)
        # the second may come when the first has ended, and finds its work done or goes on with it
        lost += codes not in (
            [0, _REFUSED],
            [0, 0],
            [-signal.SIGKILL, 0],
            [-signal.SIGKILL, _REFUSED],
        )
        lost += not faults_long.ends_well(folder, end)
    return lost


def in_two_threads(times: int) -> int:
    """Two learners with seeds train at once, and end as alone."""

    def learner(seed: int) -> Koi:
        reseed(seed)
        return Koi(dropout_net(), 0.01, 3, 8, meta_step_size=0.1, vectorize=False, seed=seed)

    lost = 0
    logging.getLogger("koi").setLevel(logging.ERROR)  # a seed in a thread is said
    for number in range(times):
        seeds = 2 * number, 2 * number + 1
        whole = [learner(seed) for seed in seeds]
        for koi in whole:
            koi.train(Noisy())
        both = [learner(seed) for seed in seeds]
        threads = [threading.Thread(target=koi.train, args=(Noisy(),)) for koi in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(both, whole, strict=True):
            lost += not faults_long.same(snapshot(one.model), snapshot(other.model))
    logging.getLogger("koi").setLevel(logging.NOTSET)
    return lost
