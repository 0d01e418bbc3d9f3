"""How time and memory grow with the meta-batch, and the pictures of it."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import harness
import memory
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator, ScalarFormatter
from tqdm import tqdm
from workloads import Work, sine_by_koi

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# A graph is compiled for each size, which takes its time.
MEMORY_SIZES = {"vectorized": (1, 8, 16, 32, 64), "vectorized+compiled": (4, 32)}
MOST_MEMORY = 1.5
CHUNK_SIZE = 8
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "0.55"
# Medians differ by this much from run to run: less is not called a rise.
_NOISE = 1.1
_PLATEAU = 1.5


def sine_sizes(device: str) -> dict[str, Work]:
    """The compiled sine net for each size of the meta-batch."""
    return {
        str(size): sine_by_koi(size, "compiled" if size == 1 else "vectorized+compiled", device)
        for size in SIZES
    }


def per_task(timings: Mapping[str, harness.Timing]) -> dict[int, float]:
    """Seconds for each task, by the number of tasks."""
    return {int(size): timing.median / int(size) for size, timing in timings.items()}


def falls(costs: Mapping[int, float]) -> bool:
    """Whether the cost never rises by more than noise, and is flat at the end."""
    values = [costs[size] for size in sorted(costs)]
    rises = [later > _NOISE * earlier for earlier, later in itertools.pairwise(values)]
    return not any(rises) and values[-2] < _PLATEAU * values[-1]


@dataclass
class Memory:
    """Peak bytes by the number of tasks, for each form, and what a task needs at least."""

    peaks: dict[str, dict[int, int]] = field(default_factory=dict)
    chunked: dict[int, int] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=memory.needed)

    @property
    def least(self) -> int:
        return sum(self.needed.values())

    def slopes(self) -> dict[str, float]:
        """For each form the slope, as a multiple of what a task needs."""
        return {form: memory.slope(peaks) / self.least for form, peaks in self.peaks.items()}


def memory_sizes(device: str) -> Memory:
    """Measure the image tasks in each form, and vectorised in chunks."""
    found = Memory()
    whole = [(form, size) for form, sizes in MEMORY_SIZES.items() for size in sizes]
    for form, size in tqdm(whole, disable=None, leave=False):
        found.peaks.setdefault(form, {})[size] = memory.peak(form, size, device=device)
    for size in tqdm(MEMORY_SIZES["vectorized"], disable=None, leave=False):
        found.chunked[size] = memory.peak("vectorized", size, CHUNK_SIZE, device)
    return found


def draw_cost(costs: Mapping[int, float], name: str) -> None:
    figure = Figure(figsize=(5.2, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(list(costs), [1e6 * cost for cost in costs.values()], "o-", color=_BLUE)
    axes.set(xscale="log", yscale="log", xlabel="tasks in a meta-batch", ylabel="µs for each task")
    axes.set_title("sine net, compiled: time of a meta-iteration for each task", fontsize=9)
    axes.set_xticks(list(costs), [str(size) for size in costs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / name)


def draw_memory(found: Memory, name: str) -> None:
    figure = Figure(figsize=(5.2, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (form, peaks), hue in zip(found.peaks.items(), (_BLUE, _RED), strict=False):
        values = [size / 1e6 for size in peaks.values()]
        axes.plot(list(peaks), values, "o-", color=hue, label=form)
    chunks = [size / 1e6 for size in found.chunked.values()]
    label = f"vectorized, chunk_size={CHUNK_SIZE}"
    axes.plot(list(found.chunked), chunks, "s--", color=_BLUE, markersize=4, label=label)
    sizes = list(found.chunked)
    least = [size * found.least / 1e6 for size in sizes]
    label = "parameters + optimizer state + activations"
    axes.plot(sizes, least, ":", color=_GREY, label=label)
    axes.set(xlabel="tasks in a meta-batch", ylabel="peak memory, MB", xlim=0, ylim=0)
    axes.set_title("Omniglot net, Adam: peak memory of a meta-iteration", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / name)
