"""What saving, reading a checkpoint and reopening a log cost after many meta-iterations.

    python benchmarks/long_history.py [records …]

prints a table, which docs/long-runs.md quotes. The records are made up; what is measured is all
that a training does with them.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from koi import Koi
from koi.models import sine_mlp
from koi.problems import Sines
from koi.records import COLUMNS, ROW

SAVES = 20


def after(number: int) -> Koi:
    """Return a learner that has so many meta-iterations behind it."""
    koi = Koi(sine_mlp(), 0.02, 2, num_iterations=number, meta_step_size=0.1, seed=0)
    state = koi.state_dict()
    rows = torch.rand(number, len(COLUMNS), dtype=torch.float64)
    rows[:, 0], rows[:, 6] = torch.arange(number), 0  # iteration, num_skipped
    rows[:, -1] = float("nan")
    state["history"]["rows"], state["iteration"] = rows, number
    koi.load_state_dict(state)
    return koi


def measured(number: int, folder: Path) -> dict[str, float]:
    """Let a training go on from there; return seconds and bytes."""
    koi = after(number)
    options = {"checkpoint_dir": folder / "run", "checkpoint_every": 1, "resume": True}
    koi.train(Sines(), **options)  # writes the history's file, once
    moments: list[float] = []
    koi.num_iterations += SAVES
    koi.train(Sines(), callbacks=[lambda *_: moments.append(time.perf_counter())], **options)
    between = sorted(later - earlier for earlier, later in pairwise(moments))
    without = sorted(record.seconds for record in koi.history[-SAVES:])
    newest = max((folder / "run").glob("iteration-*"))

    began = time.perf_counter()
    Koi.load(newest, sine_mlp())
    loaded = time.perf_counter() - began

    koi.train(Sines(), log_dir=folder / "log")
    began = time.perf_counter()
    koi.train(Sines(), log_dir=folder / "log")
    reopened = time.perf_counter() - began
    return {
        "save, ms": 1e3 * (between[len(between) // 2] - without[len(without) // 2]),
        "checkpoint, kB": newest.stat().st_size / 1e3,
        "history.f64, MB": (folder / "run" / "history.f64").stat().st_size / 1e6
        if (folder / "run" / "history.f64").exists()
        else 0.0,
        "Koi.load, s": loaded,
        "log reopened, s": reopened,
        "in memory, MB": number * ROW / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    numbers = parser.parse_args().numbers
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}\n")
    for place, number in enumerate(numbers):
        with tempfile.TemporaryDirectory() as name:
            row = measured(number, Path(name))
        if place == 0:
            print("| records |", " | ".join(row), "|\n| --: |" + " --: |" * len(row))
        print(
            f"| {number:,} |",
            " | ".join(f"{value:,.2f}" for value in row.values()),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
