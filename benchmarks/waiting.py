"""What ranks wait for in each meta-iteration, and how much of it overlapping could hide.

    python benchmarks/waiting.py            prints
    python benchmarks/waiting.py --write    writes results/waiting.*, the table in docs/scaling.md

Each loss sleeps, so that computing takes as long as it is meant to however busy the processor is.
Ranks note when they come to the one all-reduce and when they leave it, by a clock that all
processes of a machine share. Up to the last that comes the others wait, whatever is done about the
exchange; from then on it is the exchange alone that takes time: no more than this can be hidden.
Then the same training is run with an exchange in pieces (`async_op=True`), of which each travels
while the next is weighed and copied.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import harness
import torch
import torch.distributed as dist
from on_ranks import answers
from torch import nn

from koi import Koi
from koi.phi.outcome import Outcome
from koi.ranks import group
from koi.ranks.exchange import Buffer, Told, share

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
SECONDS = 0.005  # of each loss
STEPS = 2
PIECE = 2**19  # numbers that travel together


class Case(NamedTuple):
    """Ranks that train together, the last of them so many times slower."""

    ranks: int
    tasks: int
    slower: float

    def __str__(self) -> str:
        parts = [share(rank, self.ranks, self.tasks) for rank in range(self.ranks)]
        counts = ", ".join(str(end - start) for start, end in parts)
        return counts + (f"; the last {self.slower:g} times slower" if self.slower > 1 else "")


CASES = [
    Case(ranks, tasks, slower)
    for ranks in (2, 4)
    for tasks, slower in ((4, 1.0), (5, 1.0), (4, 2.0))
]
PARAMETERS = (10**5, 10**7)


class Noted(NamedTuple):
    """When a rank came to each exchange and left it, and when it left those in pieces.

    Also the seconds of an all-reduce alone.
    """

    came: list[float]
    left: list[float]
    pieces: list[float]
    alone: list[float]


class InPieces(Buffer):
    """An exchange that begins while the rank still puts in what it has; of one parameter only."""

    @torch.no_grad()
    def put(self, outcome: Outcome, rank: int, first: int) -> None:
        whole, self._parts = self._parts, []
        super().put(replace(outcome, given=[], moments=[]), rank, first)  # the figures alone
        self._parts = whole
        scale = outcome.weight / self._num_tasks
        self._works = []
        for piece, given in zip(
            self._flat[: self._size].split(PIECE), outcome.given[0].split(PIECE), strict=True
        ):
            torch.mul(given, scale, out=piece)
            self._works.append(dist.all_reduce(piece, async_op=True))
        self._empty = False

    def reduce(self, group: dist.ProcessGroup | None = None) -> Told:
        everything, self._flat = self._flat, self._flat[self._size :]
        size, self._size = self._size, 0
        told = super().reduce(group)
        self._flat, self._size = everything, size
        for work in self._works:
            work.wait()
        return told


class Sleeping:
    """A task that takes time, on which the processor does next to nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def loss(self, model: nn.Module) -> torch.Tensor:
        time.sleep(self.seconds)
        return (model.weight.mean() - 1).square()


class Tasks:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def sample(self) -> Sleeping:
        return Sleeping(self.seconds)


def noted(case: Case, parameters: int, iterations: int) -> Noted:
    """Train on this rank; return when it came and left, the first meta-iteration left out."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(parameters))
    slow = case.slower if dist.get_rank() == case.ranks - 1 else 1.0
    koi = Koi(
        model,
        0.01,
        STEPS,
        iterations + 1,
        meta_batch_size=case.tasks,
        vectorize=False,
        seed=0,
    )
    in_pieces = copy.deepcopy(koi)
    found, real = Noted([], [], [], []), dist.all_reduce

    def reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found.came.append(time.monotonic())
        done = real(tensor, *arguments, **options)
        found.left.append(time.monotonic())
        return done

    with patch.object(dist, "all_reduce", reduce):
        koi.train(Tasks(SECONDS * slow))
    with patch.object(group, "Buffer", InPieces):
        in_pieces.train(
            Tasks(SECONDS * slow), None, lambda *_: found.pieces.append(time.monotonic())
        )
    message = torch.zeros(parameters)
    for _ in range(iterations):
        dist.barrier()
        began = time.monotonic()
        real(message)
        found.alone.append(time.monotonic() - began)
    # one more all-reduce stands at the end of the training
    return Noted(found.came[1:-1], found.left[1:-1], found.pieces[1:], found.alone)


def all_noted(cases: list[tuple[Case, int]], iterations: int) -> list[Noted]:
    return [noted(*case, iterations) for case in cases]


def measured(iterations: int) -> dict[tuple[Case, int], dict[str, harness.Timing]]:
    """Measure all cases, those of as many ranks on the same ones."""
    found = {}
    for size in (2, 4):
        cases = [(case, p) for p in PARAMETERS for case in CASES if case.ranks == size]
        by_rank = answers(size, all_noted, cases, iterations)
        for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
            found[case] = timings(ranks)
    return found


def timings(ranks: Sequence[Noted]) -> dict[str, harness.Timing]:
    """Return seconds of the meta-iterations, of waiting, of exchanging, and of that alone."""
    first = [min(times) for times in zip(*(rank.came for rank in ranks), strict=True)]
    last = [max(times) for times in zip(*(rank.came for rank in ranks), strict=True)]
    ends = [statistics.median(times) for times in zip(*(rank.left for rank in ranks), strict=True)]
    alone = [
        statistics.median(times) for times in zip(*(rank.alone for rank in ranks), strict=True)
    ]
    pieces = [
        statistics.median(times) for times in zip(*(rank.pieces for rank in ranks), strict=True)
    ]
    found = {
        "meta-iteration": [b - a for a, b in itertools.pairwise(ends)],
        "wait of the first": [b - a for a, b in zip(first, last, strict=True)],
        "exchange": [b - a for a, b in zip(last, ends, strict=True)],
        "all at once": alone,
        "in pieces": [b - a for a, b in itertools.pairwise(pieces)],
    }
    return {name: harness.Timing(tuple(seconds)) for name, seconds in found.items()}


def table(found: dict[tuple[Case, int], dict[str, harness.Timing]]) -> str:
    rows = []
    for (case, parameters), times in found.items():
        medians = {name: 1e3 * timing.median for name, timing in times.items()}
        part = 100 * medians["exchange"] / medians["meta-iteration"]
        shown = [f"{float(f'{value:.3g}'):,g}" for value in medians.values()]
        row = [str(case.ranks), str(case), f"{parameters:,}"]
        rows.append([*row, *shown[:-1], f"{part:.2g} %", shown[-1]])
    head = ["ranks", "tasks of each", "parameters", "meta-iteration, ms", "the first waits"]
    head += ["exchange", "all at once", "at best hidden", "meta-iteration in pieces"]
    return harness.markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results and the page")
    parser.add_argument("--iterations", type=int, default=15)
    arguments = parser.parse_args()
    facts = harness.environment()
    found = measured(arguments.iterations)
    facts["load average after"] = harness.load_average()
    shown = table(found)
    print(shown)
    if arguments.write:
        named = {
            f"{case.ranks} ranks, {case}, {parameters} parameters": times
            for (case, parameters), times in found.items()
        }
        harness.write("waiting", "What ranks wait for", shown, facts, named)
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        said = f"`python benchmarks/waiting.py --write`: {listed}."
        harness.refresh(PAGE, "waiting", f"{shown}\n\n{said}")


if __name__ == "__main__":
    main()
