"""From an empty process to 80 % (Omniglot, 5-way 1-shot, transductive), everything counted.

python benchmarks/eighty.py DATA

Whole trainings of our own recipe, each longer than the one before, until one reaches it on 300
tasks of validation characters; with the compiler (its cache empty) and without. Seconds are from
the start of the process to the end of training: imports, data, compiling; the measurement is not.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

LENGTHS = (50, 100, 200, 400, 800)
GOAL = 80.0


def child(data: Path, num_iterations: int, compile: bool) -> None:
    import torch  # what a process needs is counted
    from recipe import measured, trained

    from koi.problems import omniglot

    torch.set_num_threads(1)
    splits = omniglot.load(data, num_validation=200, seed=0)
    koi = trained("recipe", splits, num_iterations, 0, compile)
    print("trained", flush=True)
    found = measured(koi, "recipe", splits, 1, 300)
    print(100 * found.transductive[0], flush=True)


def attempt(data: Path, num_iterations: int, compile: bool) -> tuple[float, float]:
    """Return the seconds of a training, and the accuracy in per cent."""
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, str(data), "--child", str(num_iterations), str(compile)],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - began
        return seconds, float(process.communicate()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.data, int(given.child[0]), given.child[1] == "True")
        return
    rows = []
    for compile in (False, True):
        for length in LENGTHS:
            seconds, accuracy = attempt(given.data, length, compile)
            rows.append([str(compile), str(length), f"{seconds:.0f}", f"{accuracy:.1f}"])
            print(*rows[-1], sep="\t", flush=True)
            if accuracy >= GOAL:
                break
    head = ["compile", "meta-iterations", "seconds", "accuracy, %"]
    print(harness.markdown_table(head, rows), harness.facts_list(harness.environment()), sep="\n\n")


if __name__ == "__main__":
    main()
