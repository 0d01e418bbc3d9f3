"""Koi's engines against a loop by hand and against JAX, by turns, each at its best.

Each contestant runs with one thread and with all that it may use; the faster counts. JAX has a
process of its own for each number, since it takes as many threads as it sees cores when it starts.

python benchmarks/speed.py --threads 2 --write
python benchmarks/speed.py --device cuda --write
python benchmarks/speed.py --rows sine-25 sine-1 --quick
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cold
import harness
import rows
import scaling
import torch
from harness import Timing
from rows import ROWS, Row
from workloads import Work

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
IMAGES = scaling.IMAGES.name  # as the page names the folder
HEAD = ["work", "must", "aim", "measured", "", "Koi's best form", "against"]
NAMES = ["first", *rows.GROUPS, "tasks", "memory"]


def version_of_jax() -> str:
    if importlib.util.find_spec("jax") is None:
        print("JAX is not installed: its rows are left out (pip install jax)")
        return "not installed"
    return importlib.metadata.version("jax")


@dataclass(frozen=True)
class Result:
    """What a group's contestants took for each unit, and the seconds of their first one."""

    timings: dict[str, Timing]
    first: dict[str, float]

    def fastest(self, names: tuple[str, ...]) -> str | None:
        found = [name for name in self.timings if name.split(" (")[0] in names]
        return min(found, key=lambda name: self.timings[name].median, default=None)


def compare(contestants: Mapping[str, Work], device: str, repetitions: int, span: float) -> Result:
    """Time contestants by turns, each doing in a turn as much as takes about ``span`` seconds."""

    def seconds(work: Work, units: int) -> float:
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        began = time.perf_counter()
        work.run(units)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first, units = {}, {}
    for name, work in contestants.items():
        first[name] = seconds(work, work.least)
        again = min(seconds(work, work.least) for _ in range(2))
        units[name] = work.least * max(1, round(span / again))
        print(f"  {name}: first run {first[name]:.1f} s, then {units[name]} at a time", flush=True)
    turns = {name: partial(seconds, work, units[name]) for name, work in contestants.items()}
    timings = harness.by_turns(turns, repetitions)
    return Result(
        {
            name: Timing(tuple(value / units[name] for value in timing.seconds))
            for name, timing in timings.items()
        },
        first,
    )


def verdict(value: float, must: float, aim: float) -> str:
    return "aim met" if value >= aim else "met" if value >= must else "**not met**"


def line(row: Row, result: Result) -> list[str]:
    """A line of the table; empty cells where a contestant is missing."""
    ours, against = result.fastest(row.ours), result.fastest(row.against)
    bounds = [f"{row.must:g}", f"{row.aim:g}"]
    if ours is None or against is None:
        return [row.work, *bounds, "", "left out", "", ""]
    quotient = harness.ratio(result.timings[against], result.timings[ours])
    names = [f"{name}: {1e3 * result.timings[name].median:.3g} ms" for name in (ours, against)]
    met = verdict(quotient.of_medians, row.must, row.aim)
    return [row.work, *bounds, str(quotient), met, *names]


def cost_line(result: Result) -> list[str]:
    """The line on the cost for each task as the meta-batch grows."""
    costs = scaling.per_task(result.timings)
    shown = " ".join(f"{1e6 * cost:.0f}" for cost in costs.values())
    met = "met" if scaling.falls(costs) else "**not met**"
    work = f"sine net, compiled, µs for each task with {min(costs)} to {max(costs)} tasks"
    return [work, "falls to a plateau", "", shown, met, "", ""]


def memory_line(found: scaling.Memory) -> list[str]:
    """The line on peak memory as the meta-batch grows."""
    slopes = found.slopes()
    shown = ", ".join(f"**{value:.2f}** {form}" for form, value in slopes.items())
    met = "met" if max(slopes.values()) <= scaling.MOST_MEMORY else "**not met**"
    needed = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in found.needed.items())
    work = f"Omniglot net, peak memory for each task, as a multiple of what it needs ({needed})"
    return [work, f"at most {scaling.MOST_MEMORY:g}", "", shown, met, "", ""]


def first_lines(found: Mapping[str, Mapping[int, list[float]]]) -> list[list[str]]:
    """The lines on the first meta-iteration, which compiles; the quicker first."""
    lines = []
    for name, seconds in found.items():
        (must, aim), parts = cold.MUST_AIM[name], []
        ranked = sorted(seconds.items(), key=lambda each: statistics.median(each[1]))
        for threads, times in ranked:
            shown = f"{statistics.median(times):.1f} s"
            span = f"({min(times):.1f}–{max(times):.1f})"
            where = f"with {threads} thread{'s' * (threads > 1)}"
            parts.append(f"{shown} {span} {where}" if parts else f"**{shown}** {span} {where}")
        work = f"Omniglot net, first meta-iteration, compiled, {name}"
        met = verdict(-statistics.median(ranked[0][1]), -must, -aim)
        lines.append([work, f"at most {must} s", f"{aim} s", ", ".join(parts), met, "", ""])
    return lines


def detail(name: str, result: Result) -> list[list[str]]:
    """What every contestant of a group took."""
    unit = "task" if name == "evaluation" else "meta-iteration"
    return [
        [name, contestant, f"{1e3 * timing.median:.3g}", unit, f"{result.first[contestant]:.1f}"]
        for contestant, timing in result.timings.items()
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="ROWS",
        help=f"what to measure, of {', '.join(NAMES)}",
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that may be used")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="5 repetitions of shorter turns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--write", action="store_true", help="write to benchmarks/results and docs/engines.md"
    )
    parser.add_argument("--out", type=Path, help="write the tables to this folder, and no page")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    device, threads = arguments.device, arguments.threads
    repetitions, span = (5, 0.05) if arguments.quick else (arguments.repetitions, 0.1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    facts = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        **harness.environment(),
        "jax": version_of_jax(),
        "threads": threads,
    }
    found = Found(repetitions)
    for name in (name for name in NAMES if name in arguments.rows):
        print(f"{name} (load average {harness.load_average()})", flush=True)
        torch.manual_seed(0)
        try:
            lines = measure(name, found, device, threads, span)
        except Exception:  # what was measured before is kept, and the next rows are tried
            traceback.print_exc()
            continue
        for cells in lines:
            print("  " + " | ".join(cells), flush=True)
        found.lines += lines
        facts["load average after"] = harness.load_average()
        if arguments.out is not None:
            write(found, facts, device, threads, arguments.out)
        if arguments.write:
            publish(found, facts, device, threads)
    print(found.report(), *(f"{key}: {value}" for key, value in facts.items()), sep="\n")


@dataclass
class Found:
    """All that has been measured so far."""

    repetitions: int
    lines: list[list[str]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    memory: scaling.Memory | None = None
    first: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def report(self) -> str:
        """Both tables with what a reader must know of them."""
        details = [cells for name, result in self.results.items() for cells in detail(name, result)]
        table = harness.markdown_table(HEAD, self.lines)
        every = harness.markdown_table(["rows", "", "ms", "for each", "first run, s"], details)
        return (
            f"How many times faster Koi is: quotients of medians of {self.repetitions} turns, each "
            "contestant at its best number of threads, sampling, meta-update and records included; "
            f"{harness.BRACKETS}. Images are "
            "random: the sizes are Omniglot's. The evaluation is of 5-way 1-shot tasks, 50 steps "
            "of batch 5, in Koi's chunks; its unit is a task, since 1,000 tasks are many such "
            f"chunks.\n\n{table}\n\nWhat every contestant took. The first run compiles.\n\n{every}"
        )


def measure(name: str, found: Found, device: str, threads: int, span: float) -> list[list[str]]:
    """Measure a group, note what was found, and return its lines of the table."""
    if name == "first":
        found.first = cold.measured({1, threads}, 3 if found.repetitions > 5 else 1)
        return first_lines(found.first)
    if name == "memory":
        found.memory = scaling.memory_sizes(device)
        return [memory_line(found.memory)]
    numbers = sorted({1, threads}) if device == "cpu" else [threads]
    contestants = rows.contestants(name, device, numbers)
    result = compare(contestants, device, found.repetitions, span)
    found.results[name] = result
    if name == "tasks":
        return [cost_line(result)]
    return [line(row, result) for row in ROWS if row.group == name]


def write(
    found: Found, facts: Mapping[str, Any], device: str, threads: int, folder: Path
) -> dict[str, dict[str, Timing]]:
    """Write the tables to a folder; return the timings."""
    timings = {name: result.timings for name, result in found.results.items()}
    name = name_of(device, threads)
    title = f"Speed with {threads} thread{'s' * (threads > 1)}"
    memory = None if found.memory is None else asdict(found.memory)
    more = {"memory": memory, "first": found.first}
    harness.write(name, title, found.report(), facts, timings, folder, **more)
    return timings


def name_of(device: str, threads: int) -> str:
    return f"speed-{threads}threads" if device == "cpu" else "speed-cuda"


def publish(found: Found, facts: Mapping[str, Any], device: str, threads: int) -> None:
    """Write the results, the pictures, and the table of the documentation."""
    timings = write(found, facts, device, threads, harness.RESULTS)
    name, pictures = name_of(device, threads), []
    if "tasks" in timings:
        scaling.draw_cost(scaling.per_task(timings["tasks"]), f"{name}-tasks.png")
        pictures.append(
            f"![Time for each task, by the size of the meta-batch]({IMAGES}/{name}-tasks.png)"
        )
    if found.memory is not None:
        scaling.draw_memory(found.memory, f"{name}-memory.png")
        pictures.append(
            f"![Peak memory, by the size of the meta-batch]({IMAGES}/{name}-memory.png)"
        )
    brief = harness.markdown_table(HEAD[:5], [cells[:5] for cells in found.lines])
    harness.refresh(PAGE, name, "\n\n".join([brief, *pictures, brief_facts(facts)]))


def brief_facts(facts: Mapping[str, Any]) -> str:
    """What a reader of the documentation must know of a table."""
    machine = facts.get("gpu", f"{facts['processor']} ({facts['instructions']})")
    return (
        f"{machine}, threads: {facts['threads']}, torch {facts['torch']}, JAX {facts['jax']}, "
        f"{facts['date']}, load average before: {facts['load average before']}. "
        f"Made by `{facts['command']}`."
    )


if __name__ == "__main__":
    main()
