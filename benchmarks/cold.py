"""The first meta-iteration of a training with compile=True, in a new process.

python benchmarks/cold.py 2     seconds on the Omniglot net with 2 threads, by torch's usual cache
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from workloads import OMNIGLOT, RandomImages

MUST_AIM = {"empty cache": (15, 8), "cache filled": (4, 2)}


def first_seconds(num_threads: int) -> float:
    """Seconds of the first meta-iteration; what was imported before is not counted."""
    torch.set_num_threads(num_threads)
    koi = OMNIGLOT.koi("vectorized+compiled", "cpu")
    koi.vectorize = "auto"
    began = time.perf_counter()
    koi.train(RandomImages(), progress=False)
    return time.perf_counter() - began


def measured(numbers: Iterable[int], repetitions: int) -> dict[str, dict[int, list[float]]]:
    """Seconds by number of threads, with an empty cache of the compiler, then with a filled one."""
    found: dict[str, dict[int, list[float]]] = {name: {n: [] for n in numbers} for name in MUST_AIM}
    for _, number in itertools.product(range(repetitions), found["empty cache"]):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            for seconds in found.values():
                done = subprocess.run(
                    [sys.executable, str(Path(__file__)), str(number)],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seconds[number].append(float(done.stdout))
    return found


if __name__ == "__main__":
    print(first_seconds(int(sys.argv[1])))
