"""What drawing tasks costs on ranks, and what workers that draw ahead gain.

    python benchmarks/drawing.py            prints
    python benchmarks/drawing.py --write    writes results/drawing.* and the tables in docs/

On four ranks: a meta-batch of 16 tasks, each of which takes 10 ms to draw, by sleeping, so that
ranks do not wait for each other's processor. Ahead: 5-way 1-shot episodes of a folder of JPEGs,
which are read, decoded and made smaller as they are drawn, and the 16 tasks that sleep, with 0, 1
and 2 workers by turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F

from koi import Koi, SupervisedTask
from koi.fewshot import Episodes, labelled
from koi.models import mini_imagenet_net
from koi.training.draws import Draws

DOCS = Path(__file__).parent.parent / "docs"
SECONDS = 0.01  # of each draw
NUM_TASKS = 16
NUM_RANKS = 4
ITERATIONS = 5
WORKERS = (0, 1, 2)
# A folder of JPEGs: classes, images of each, pixels of a side.
CLASSES, IMAGES, SIDE = 20, 30, 400


class Slow:
    """Tasks that take long to draw, and keep nothing."""

    def sample(self) -> SupervisedTask:
        time.sleep(SECONDS)
        x = torch.randn(5, 1)
        return SupervisedTask(x, 2 * x, x, 2 * x, torch.tensor(0))


class Counting(Slow):
    """The same, with a state: every rank draws all."""

    count = 0

    def sample(self) -> SupervisedTask:
        self.count += 1
        return super().sample()

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def drawing(tasks: Any) -> Callable[[], float]:
    """Return a function that trains on, and returns the seconds of a meta-batch's drawing."""
    koi = Koi(nn.Linear(1, 1), 0.01, 2, 0, meta_batch_size=NUM_TASKS, seed=0)
    seconds: list[float] = []
    take = Draws.take

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        batch = take(*arguments)
        seconds.append(time.perf_counter() - began)
        return batch

    def train() -> float:
        seconds.clear()
        koi.num_iterations += ITERATIONS
        with patch.object(Draws, "take", timed):
            koi.train(tasks)
        return sum(seconds) / ITERATIONS

    return train


def serve(pipe: Connection, port: int, rank: int) -> None:
    """Be a rank that trains on the one kind of tasks and the other whenever asked."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    turns = {"its share": drawing(Slow()), "all": drawing(Counting())}
    while (what := pipe.recv()) is not None:
        pipe.send(turns[what]())


def on_ranks(repetitions: int) -> dict[str, harness.Timing]:
    """Time meta-iterations in one process and on four ranks."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = []
    for rank in range(NUM_RANKS):
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, store.port, rank), daemon=True).start()
        pipes.append(here)

    def ask(what: str) -> float:
        for pipe in pipes:
            pipe.send(what)
        return max(pipe.recv() for pipe in pipes)

    alone = drawing(Slow())
    seconds: dict[str, list[float]] = {"one process": [], "4 ranks, all": [], "4 ranks, share": []}
    turns = {
        "one process": lambda: seconds["one process"].append(alone()),
        "4 ranks, all": lambda: seconds["4 ranks, all"].append(ask("all")),
        "4 ranks, share": lambda: seconds["4 ranks, share"].append(ask("its share")),
    }
    harness.by_turns(turns, repetitions)
    for pipe in pipes:
        pipe.send(None)
    return {name: harness.Timing(tuple(each[-repetitions:])) for name, each in seconds.items()}


def ranks_table(timings: dict[str, harness.Timing]) -> str:
    names = {
        "one process": "one process",
        "4 ranks, all": "4 ranks, a distribution with a state: each draws all",
        "4 ranks, share": "4 ranks, each draws its share",
    }
    rows = [[name, f"{1e3 * timings[key].median:.1f}"] for key, name in names.items()]
    return harness.markdown_table(["16 tasks of 10 ms each", "ms to draw them"], rows)


def make_folder(folder: Path) -> None:
    """Write JPEGs of noise, as smooth as a photograph is."""
    generator = torch.Generator().manual_seed(0)
    for number in range(CLASSES * IMAGES):
        small = torch.rand(3, SIDE // 8, SIDE // 8, generator=generator).unsqueeze(0)
        image = F.interpolate(small, (SIDE, SIDE), mode="bilinear")[0].mul(255).byte()
        path = folder / f"class-{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, quality=90)


def ahead(make: Callable[[], Koi], tasks: Any, repetitions: int) -> dict[str, harness.Timing]:
    """Time meta-iterations by the number of workers that draw ahead."""
    seconds: dict[str, list[float]] = {str(workers): [] for workers in WORKERS}
    learners = {}
    for workers in WORKERS:
        torch.manual_seed(0)
        learners[workers] = make()

    def turn(workers: int) -> None:
        koi = learners[workers]
        koi.num_iterations += ITERATIONS + 1
        koi.train(tasks, workers=workers)
        mean = sum(record.seconds for record in koi.history[-ITERATIONS:]) / ITERATIONS
        seconds[str(workers)].append(mean)

    torch.set_num_threads(1)
    turns = {str(workers): partial(turn, workers) for workers in WORKERS}
    harness.by_turns(turns, repetitions)
    return {name: harness.Timing(tuple(each[-repetitions:])) for name, each in seconds.items()}


def of_images(repetitions: int) -> dict[str, harness.Timing]:
    """Draw from a folder of JPEGs."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        tasks = Episodes(labelled(name, image_size=84, max_bytes=0), 5, 1, num_queries=5)
        make = lambda: Koi(mini_imagenet_net(5), 0.001, 5, 0, meta_batch_size=2, seed=0)  # noqa: E731
        return ahead(make, tasks, repetitions)


def of_waiting(repetitions: int) -> dict[str, harness.Timing]:
    """Draw by waiting, as for a disk or a network."""
    make = lambda: Koi(nn.Linear(1, 1), 0.01, 2, 0, meta_batch_size=NUM_TASKS, seed=0)  # noqa: E731
    return ahead(make, Slow(), repetitions)


def ahead_table(images: dict[str, harness.Timing], waiting: dict[str, harness.Timing]) -> str:
    rows = []
    for workers in images:
        row = [workers]
        for timings in (images, waiting):
            shown = "1" if workers == "0" else str(harness.ratio(timings["0"], timings[workers]))
            row += [f"{1e3 * timings[workers].median:.0f}", shown]
        rows.append(row)
    head = ["workers", "JPEGs, ms of a meta-iteration", "times as fast"]
    head += ["draws that wait, ms of a meta-iteration", "times as fast"]
    return harness.markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results and the pages")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    facts = harness.environment()
    number = arguments.repetitions
    timings = {"ranks": on_ranks(number)}
    timings |= {"JPEGs": of_images(number), "draws that wait": of_waiting(number)}
    facts["load average after"] = harness.load_average()
    workers = ahead_table(timings["JPEGs"], timings["draws that wait"])
    tables = {"ranks": ranks_table(timings["ranks"]), "workers": workers}
    print(*tables.values(), sep="\n\n")
    if arguments.write:
        harness.write("drawing", "Drawing tasks", "\n\n".join(tables.values()), facts, timings)
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        said = f"`python benchmarks/drawing.py --write`: {listed}."
        harness.refresh(DOCS / "scaling.md", "drawing", f"{tables['ranks']}\n\n{said}")
        harness.refresh(DOCS / "long-runs.md", "ahead", f"{tables['workers']}\n\n{said}")


if __name__ == "__main__":
    main()
