"""MAML's memory and time as the inner loop grows: through one graph, and step by step.

python benchmarks/inner_steps.py prints a table; each row is two processes of its own, by turns.
`python benchmarks/inner_steps.py WORK STEPS WAY` measures one: seconds and bytes.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from memory import highest, in_use, reset_peak
from torch import nn

import koi.inner.second_order as second_order
from koi import Koi
from koi.models import sine_mlp
from koi.problems import Sines

ROWS = [("sine", k) for k in (10, 50, 200, 1000)] + [("siren", k) for k in (5, 20, 100)]
REPETITIONS = 5


class Sine(nn.Module):
    """sin(30 x), the activation of SIREN (Sitzmann et al., arXiv 2006.09661)."""

    def forward(self, x):
        return torch.sin(30 * x)


def siren() -> nn.Sequential:
    """Return 2 → 64 → 64 → 64 → 1 with sines, and the initial values of section 3.2."""
    layers: list[nn.Module] = []
    for i, size in enumerate((2, 64, 64)):
        layers += [nn.Linear(size, 64), Sine()]
        bound = 1 / size if i == 0 else (6 / size) ** 0.5 / 30
        nn.init.uniform_(layers[-2].weight, -bound, bound)
    return nn.Sequential(*layers, nn.Linear(64, 1))


class Image:
    """A random smooth image of 32 × 32 pixels as a function of the place."""

    def __init__(self):
        line = torch.linspace(-1, 1, 32)
        self.places = torch.cartesian_prod(line, line)
        self.values = torch.sin(self.places @ torch.randn(2, 4) * 3).mean(1, keepdim=True)

    def loss(self, model):
        return (model(self.places) - self.values).square().mean()


class Images:
    def sample(self):
        return Image()


WORK = {"sine": (sine_mlp, Sines, 0.01), "siren": (siren, Images, 1e-4)}


def measure(work: str, num_steps: int, way: str) -> tuple[float, int]:
    """Return the median seconds of a meta-iteration, and the peak of memory beyond the start."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    second_order.MOST_IN_ONE_GRAPH = 10**9 if way == "graph" else 0
    net, tasks, rate = WORK[work]
    koi = Koi(
        net(), rate, num_steps, 100, algorithm="maml", meta_step_size=1e-4, seed=0, check=False
    )
    tasks = tasks()
    koi.num_steps = 2
    koi.step(tasks)  # what is made once
    koi.num_steps = num_steps
    reset_peak("cpu")
    before, seconds = in_use("cpu"), []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        koi.step(tasks)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), highest("cpu") - before


def run(work: str, num_steps: int, way: str) -> tuple[float, int]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, work, str(num_steps), way]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, size = done.stdout.split()
    return float(seconds), int(size)


def main() -> None:
    """Print the table."""
    print(
        "| network | inner steps | one graph, MB | step by step, MB | time, step by step / graph |"
    )
    print("| :-- | --: | --: | --: | --: |")
    for work, num_steps in ROWS:
        found = {way: run(work, num_steps, way) for way in ("graph", "steps")}
        sizes = [f"{found[way][1] / 2**20:,.1f}" for way in found]
        ratio = found["steps"][0] / found["graph"][0]
        print(f"| {work} | {num_steps:,} | {' | '.join(sizes)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(*measure(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    else:
        main()
