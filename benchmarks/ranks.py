"""What several ranks gain and cost, and what that means for many: `docs/scaling.md`.

    python benchmarks/ranks.py            prints
    python benchmarks/ranks.py --write    writes results/ranks.* and the tables in docs/scaling.md

Two single-threaded ranks take turns with one process of two threads and with one of a single
thread, on the same work, so that what else the machine does strikes all of them alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import paper_scaling
import torch
import torch.distributed as dist
from torch import nn
from workloads import RandomImages, adam

from koi import Koi
from koi.models import omniglot_net, sine_mlp
from koi.problems import Sines

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
CONTESTANTS = {"one process, 1 thread": (1, 1), "one process, 2 threads": (1, 2), "2 ranks": (2, 1)}
# Meta-iterations in each turn.
WORKS = {
    "sine net, 64 tasks at once": 20,
    "sine net, 8 tasks one by one": 20,
    "Omniglot net, 4 tasks one by one": 3,
}
MESSAGE_SIZES = (4, 10**4, 10**6, 10**7, 4 * 10**7)  # bytes
LARGE = 5000  # of a side: 25 million parameters, 100 MB


def learner(work: str) -> tuple[Koi, Any]:
    """Return a learner that has done nothing yet, and its tasks."""
    torch.manual_seed(0)
    net, tasks, step = (
        (omniglot_net(5), RandomImages(), 0.001)
        if work.startswith("Omniglot")
        else (sine_mlp(), Sines(), 0.02)
    )
    number = int(work.split(", ")[1].split()[0])
    together = work.endswith("at once")
    settings: dict[str, Any] = {"meta_batch_size": number, "vectorize": together, "seed": 0}
    optimizer = adam if work.startswith("Omniglot") else "sgd"
    return Koi(net, step, 5, 1, inner_optimizer=optimizer, **settings), tasks


def serve(pipe: Connection, port: int, rank: int, size: int, threads: int) -> None:
    """Be a rank: do what the pipe says, and answer."""
    torch.set_num_threads(threads)
    if size > 1:
        store = dist.TCPStore("localhost", port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    learners: dict[str, tuple[Koi, Any]] = {}
    while True:
        what, argument = pipe.recv()
        if what == "train":
            koi, tasks = learners.get(argument) or learner(argument)
            learners[argument] = koi, tasks
            koi.num_iterations = koi.iteration + WORKS[argument]
            koi.train(tasks)
            pipe.send(sum(record.seconds for record in koi.history[-WORKS[argument] :]))
        elif what == "bytes":
            pipe.send(bytes_of_a_meta_iteration(argument))
        elif what == "message":
            pipe.send(seconds_of_a_message(argument))
        elif what == "memory":
            pipe.send(bytes_for_each_parameter(argument))
        else:
            return


def bytes_of_a_meta_iteration(work: str) -> int:
    """Return the size of the one buffer."""
    sizes, real = [], dist.all_reduce

    def counted(tensor: torch.Tensor, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return real(tensor, **options)

    koi, tasks = learner(work)
    koi.num_iterations = 1
    dist.all_reduce = counted
    try:
        koi.train(tasks)
    finally:
        dist.all_reduce = real
    return sizes[0]


def seconds_of_a_message(size: int) -> float:
    """Return the least time of an all-reduce: what is sent and not what else goes on."""
    message = torch.zeros(max(1, size // 4))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        dist.all_reduce(message)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Target:
    """A task that costs next to nothing: its loss reads one row of a large layer."""

    def loss(self, model: nn.Module) -> torch.Tensor:
        return (model(torch.ones(1, LARGE)) - 1).square().mean()


class Targets:
    def sample(self) -> Target:
        return Target()


def bytes_for_each_parameter(optimizer: str) -> float:
    """Return the peak of a rank's memory above what it began with, by the size of φ."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net, inner = nn.Linear(LARGE, LARGE, bias=False), adam if optimizer == "adam" else "sgd"
    Koi(net, 1e-3, 2, 2, meta_batch_size=4, inner_optimizer=inner, seed=0).train(Targets())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * (peak - before) / LARGE**2


class Team:
    """The ranks of one contestant."""

    def __init__(self, size: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._pipes = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, self._store.port, rank, size, threads)
            context.Process(target=serve, args=arguments, daemon=True).start()
            self._pipes.append(here)

    def __call__(self, what: str, argument: Any = None) -> Any:
        """Let all do something; return what the first answers."""
        for pipe in self._pipes:
            pipe.send((what, argument))
        first, *_ = [pipe.recv() for pipe in self._pipes]
        return first

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(("end", None))


def memory_with(optimizer: str) -> float:
    """Return the bytes that ranks need for each parameter, measured in fresh ones."""
    team = Team(2, 1)
    found: float = team("memory", optimizer)
    team.end()
    return found


def timings_of(teams: dict[str, Team], repetitions: int) -> dict[str, dict[str, harness.Timing]]:
    """Time every work; a turn counts the seconds of its meta-iterations alone."""
    found = {}
    for work in WORKS:
        seconds: dict[str, list[float]] = {name: [] for name in teams}

        def turn(name: str, work: str = work, seconds: Any = seconds) -> Callable[[], object]:
            return lambda: seconds[name].append(teams[name]("train", work))

        harness.by_turns({name: turn(name) for name in teams}, repetitions)
        found[work] = {
            name: harness.Timing(tuple(values[-repetitions:])) for name, values in seconds.items()
        }
    return found


def measured_table(timings: dict[str, dict[str, harness.Timing]], sizes: dict[str, int]) -> str:
    """Return efficiencies and bytes."""
    one, two, ranks = CONTESTANTS
    rows = []
    for work, times in timings.items():
        single = harness.ratio(times[one], times[ranks]).of_medians
        milliseconds = 1e3 * times[ranks].median / WORKS[work]
        rows.append(
            [
                work,
                f"{milliseconds:.3g}",
                str(harness.ratio(times[two], times[ranks])),
                f"{single / 2:.2f}",
                f"{sizes[work]:,}",
            ]
        )
    head = [
        "work",
        "2 ranks, ms",
        "against 2 threads",
        "of 2 × 1 thread",
        "bytes each rank sends",
    ]
    return harness.markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results and the page")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    facts = harness.environment()
    teams = {name: Team(*shape) for name, shape in CONTESTANTS.items()}
    ranks = teams["2 ranks"]
    timings = timings_of(teams, arguments.repetitions)
    facts["load average after"] = harness.load_average()
    sizes = {work: ranks("bytes", work) for work in WORKS}
    messages = {size: ranks("message", size) for size in MESSAGE_SIZES}
    for team in teams.values():
        team.end()
    memory = {name: memory_with(name) for name in ("sgd", "adam")}
    work = "Omniglot net, 4 tasks one by one"
    step = timings[work]["one process, 1 thread"].median / (WORKS[work] * 4 * 5)
    measured = measured_table(timings, sizes)
    computed = paper_scaling.text(messages, memory, step)
    print(measured, "", computed, sep="\n")
    if arguments.write:
        more = {"bytes": sizes, "messages": messages, "bytes for each parameter": memory}
        text = f"{measured}\n\n{computed}"
        harness.write("ranks", "Two ranks", text, facts, timings, **more)
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        harness.refresh(PAGE, "measured", f"{measured}\n\n{listed}.")
        harness.refresh(PAGE, "computed", computed)


if __name__ == "__main__":
    main()
