"""What shards of φ save and cost: `docs/scaling.md`.

    python benchmarks/shards.py            prints
    python benchmarks/shards.py --write    writes results/shards.* and the tables in docs/scaling.md

A model of eight equal layers, each sharded by itself, on one process and on task groups × shards.
Times come first, with SGD. Then memory, in other processes: the resident set's peak while training,
above what the process held before it had a model. What torch sends within a group is counted where
its operators are called.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import paper_scaling
import torch
from on_ranks import answers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import adam

from koi import Koi, SupervisedTask
from ranks import seconds_of_a_message

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
LAYERS, SIDE, EXAMPLES = 8, 1280, 8
STEPS, TASKS = 5, 2
OPTIMIZERS = {"SGD": "sgd", "Adam": adam}
WHOLE = "one process, whole"
LAYOUTS = {WHOLE: None, "1 × 2": (1, 2), "2 × 2": (2, 2), "1 × 4": (1, 4)}


class Speed(NamedTuple):
    """What one rank has found of time.

    Args:
        seconds: of each meta-iteration but the first.
        messages: within the group in a meta-iteration.
        sent: the bytes of these, as every rank has them in the end.
    """

    seconds: list[float]
    messages: int
    sent: int


class Tasks:
    def __init__(self, side: int) -> None:
        self.side = side

    def sample(self) -> SupervisedTask:
        x = torch.randn(EXAMPLES, self.side)
        return SupervisedTask(x, x.roll(1, 1), x, x.roll(1, 1), torch.tensor(0))


def net(side: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(LAYERS):
        parts += [nn.Linear(side, side), nn.Tanh()]
    return nn.Sequential(*parts)


def model(side: int, layout: tuple[int, int] | None) -> nn.Sequential:
    """Return a model that was never whole on any rank, if it is sharded."""
    with torch.device("meta"):
        made = net(side)
    if layout is not None:
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=("tasks", "shards"))["shards"]
        for layer in made:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
    made.to_empty(device="cpu")
    with torch.no_grad():
        for param in made.parameters():
            rows = param.to_local() if layout else param  # type: ignore[operator]
            rows.uniform_(-(side**-0.5), side**-0.5)
    return made


class Counting(TorchDispatchMode):
    """Counts what is sent within a task group."""

    messages = sent = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.name().startswith(("c10d::_allgather_base", "c10d::_reduce_scatter_base")):
            self.messages += 1
            self.sent += max(tensor.nbytes for tensor in args[:2])
        return function(*args, **(kwargs or {}))


def resident(what: str) -> int:
    """Return bytes: VmRSS for those of now, VmHWM for the most there were."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def learner(side: int, layout: tuple[int, int] | None, inner: Any, steps: int) -> Koi:
    """Return a learner without the self-check, which only a model that is whole has."""
    settings: dict[str, Any] = {"meta_batch_size": TASKS, "vectorize": False, "check": False}
    return Koi(model(side, layout), 1e-3, steps, 2, inner_optimizer=inner, seed=0, **settings)


def memory(layout: tuple[int, int] | None) -> dict[str, int]:
    """Return the bytes that a training takes on this rank at its peak."""
    learner(8, layout, "sgd", 2).train(Tasks(8))  # what comes with a first training is not φ's
    found = {}
    for name, inner in OPTIMIZERS.items():
        gc.collect()
        before = resident("VmRSS")
        koi = learner(SIDE, layout, inner, 2)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is that of now
        koi.train(Tasks(SIDE))
        found[name] = resident("VmHWM") - before
        del koi
    return found


def speed(layout: tuple[int, int] | None, iterations: int) -> Speed:
    """Return how long meta-iterations with SGD take, and what is sent within a group."""
    koi, tasks = learner(SIDE, layout, "sgd", STEPS), Tasks(SIDE)
    koi.num_iterations = iterations + 1
    koi.train(tasks)
    seconds = [record.seconds for record in koi.history[1:]]
    koi.num_iterations += 1
    with Counting() as counted:
        koi.train(tasks)
    return Speed(seconds, counted.messages, counted.sent)


def link() -> paper_scaling.Link:
    """Measure what connects two ranks here."""
    sizes = (4, 4 * 10**7)
    (messages, _) = answers(2, messages_of, sizes)
    return paper_scaling.Link.of(messages)


def messages_of(sizes: Sequence[int]) -> dict[int, float]:
    return {size: seconds_of_a_message(size) for size in sizes}


def measured_table(peaks: Mapping[str, Mapping[str, int]], speeds: Mapping[str, Speed]) -> str:
    rows = []
    for layout, peak in peaks.items():
        row = [layout]
        for name, most in peak.items():
            row += [f"{most / 1e6:.0f}", f"{most / peaks[WHOLE][name]:.2f}"]
        its, least = speeds[layout], min(speeds[layout].seconds)
        row += [f"{1e3 * least:,.0f}", f"{min(speeds[WHOLE].seconds) / least:.2f}"]
        rows.append([*row, str(its.messages), f"{its.sent / 1e6:,.0f}"])
    head = ["task groups × shards", "peak with SGD, MB", "of whole", "with Adam, MB", "of whole"]
    head += ["meta-iteration, ms", "times as fast", "messages", "MB in them"]
    return harness.markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results and the page")
    parser.add_argument("--iterations", type=int, default=4)
    arguments = parser.parse_args()
    facts = harness.environment()
    sizes = {name: 1 if shape is None else shape[0] * shape[1] for name, shape in LAYOUTS.items()}
    speeds = {
        name: answers(sizes[name], speed, layout, arguments.iterations)[0]
        for name, layout in LAYOUTS.items()
    }
    between = link()
    # freed memory goes back to the system at once, which takes time
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    peaks = {}
    for name, layout in LAYOUTS.items():
        ranks = answers(sizes[name], memory, layout)
        peaks[name] = {inner: max(rank[inner] for rank in ranks) for inner in OPTIMIZERS}
    facts["load average after"] = harness.load_average()
    measured = measured_table(peaks, speeds)
    count = LAYERS * (SIDE + 1) * SIDE
    steps = TASKS * STEPS
    sharding = paper_scaling.Sharding(
        parameters=count,
        step=min(speeds[WHOLE].seconds) / steps,
        layers=LAYERS,
        messages=speeds["1 × 2"].messages / steps,
        sent=speeds["1 × 2"].sent / steps / count,
    )
    computed = paper_scaling.sharded_text(sharding, between)
    print(measured, computed, sep="\n\n")
    if arguments.write:
        timings = {
            layout: {"sgd": harness.Timing(tuple(its.seconds))} for layout, its in speeds.items()
        }
        text = f"{measured}\n\n{computed}"
        harness.write("shards", "Shards", text, facts, timings, peaks=peaks)
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        said = f"`python benchmarks/shards.py --write`: {listed}."
        harness.refresh(PAGE, "shards", f"{measured}\n\n{said}")
        harness.refresh(PAGE, "sharded", computed)


if __name__ == "__main__":
    main()
