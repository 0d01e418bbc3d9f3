"""The first meta-iteration of a training with compile=True, in a new process.

python benchmarks/cold.py 2     seconds on the Omniglot net with 2 threads, by torch's usual cache
"""

import os
import subprocess
import sys
import tempfile
import time
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


def measured(num_threads: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds with an empty cache of the compiler, and with what it then holds."""
    found: dict[str, list[float]] = {name: [] for name in MUST_AIM}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            for name in found:
                done = subprocess.run(
                    [sys.executable, str(Path(__file__)), str(num_threads)],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found[name].append(float(done.stdout))
    return found


if __name__ == "__main__":
    print(first_seconds(int(sys.argv[1])))
