"""What every benchmark here shares: timing by turns, facts of the machine, results on disk."""

import csv
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import koi

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one contestant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def by_turns(
    contestants: Mapping[str, Callable[[], object]], repetitions: int, warmups: int = 1
) -> dict[str, Timing]:
    """Time the contestants alternately, each going first as often as the others.

    Whatever else the machine does then strikes all of them alike.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in tqdm(range(-warmups, repetitions), disable=None, leave=False):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            contestants[name]()
            elapsed = time.perf_counter() - began
            if repetition >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class Quotient(NamedTuple):
    """How two timings compare: the quotient of their medians, and the quotients turn by turn.

    The first can lie outside the quartiles of the others, hence their own median.
    """

    of_medians: float
    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"**{self.of_medians:.2f}** ({self.median:.2f}, {self.low:.2f}–{self.high:.2f})"


BRACKETS = "in brackets the median of the turn-by-turn quotients, and their quartiles"


def ratio(timing: Timing, reference: Timing) -> Quotient:
    """How many times ``reference`` goes into ``timing``."""
    quotients = [a / b for a, b in zip(timing.seconds, reference.seconds, strict=True)]
    return Quotient(timing.median / reference.median, *statistics.quantiles(quotients, n=4))


def environment() -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "koi": koi.__version__,
        "load average before": load_average(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16; a processor that does not is many times slower."""
    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def load_average() -> str:
    """The load over the last 1, 5 and 15 minutes; above the number of cores, timings suffer."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "?"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, numbers to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for programs."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def facts_list(facts: Mapping[str, Any]) -> str:
    """The facts as a Markdown list."""
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def write(
    name: str,
    title: str,
    text: str,
    facts: Mapping[str, Any],
    timings: Mapping[str, Mapping[str, Timing]],
    folder: Path = RESULTS,
    **more: Any,
) -> None:
    """Write NAME.md for readers, NAME.csv of medians, NAME.json of every repetition, and more."""
    folder.mkdir(parents=True, exist_ok=True)
    page = f"# {title}\n\n{text}\n\n{facts_list(facts)}\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    medians = [
        [case, contestant, f"{timing.median:.6g}"]
        for case, contestants in timings.items()
        for contestant, timing in contestants.items()
    ]
    write_csv(folder / f"{name}.csv", ["rows", "contestant", "median seconds"], medians)
    measured = {
        case: {contestant: asdict(timing) for contestant, timing in contestants.items()}
        for case, contestants in timings.items()
    }
    content = json.dumps({"environment": facts, "timings": measured, **more}, indent=1)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")


def refresh(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in a page."""
    content = page.read_text(encoding="utf-8")
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", content, re.DOTALL)
    if found is not None:
        content = f"{content[: found.start()]}\n{text}\n\n{content[found.end() :]}"
        page.write_text(content, encoding="utf-8")
