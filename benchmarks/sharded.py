"""What shards of φ cost and save: `docs/scaling.md`.

    python benchmarks/sharded.py            prints
    python benchmarks/sharded.py --write    writes results/sharded.* and tables in docs/scaling.md

A model of 16 layers, 16.8 million parameters, on four ranks: whole on each, in two groups of two
shards, in one group of four. Memory is the peak of a rank above what it began with, in ranks that
do nothing else; bytes are those of the one all-reduce between task groups in a meta-iteration.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import paper_scaling
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from workloads import adam

from koi import Koi

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
LAYERS, SIDE = 16, 1024
RANKS = 4
SHARDS = (1, 2, 4)


class Task:
    """Next to no activations, so that what is measured is weights."""

    def loss(self, model: nn.Module) -> torch.Tensor:
        return (model(torch.ones(1, SIDE)) - 1).square().mean()


class Tasks:
    def sample(self) -> Task:
        return Task()


def measure(pipe: Connection, port: int, rank: int, shards: int, optimizer: str) -> None:
    """Train, and answer with the peak of memory, the bytes that are sent, and the seconds."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS // shards, shards), mesh_dim_names=("tasks", "shards"))
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return real(tensor, *arguments, **options)

    dist.all_reduce = counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = nn.Sequential()
    for _ in range(LAYERS):  # sharded as it grows: it need not fit in one rank's memory
        layer = nn.Linear(SIDE, SIDE, bias=False)
        model.append(fully_shard(layer, mesh=mesh["shards"]) if shards > 1 else layer)
    if shards > 1:
        fully_shard(model, mesh=mesh["shards"])
    inner: Any = adam if optimizer == "adam" else "sgd"
    koi = Koi(model, 1e-3, 2, 3, meta_batch_size=4, inner_optimizer=inner, seed=0)
    koi.train(Tasks())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((1024 * (peak - before), max(sent), min(r.seconds for r in koi.history)))
    pipe.recv()


def measured(shards: int, optimizer: str) -> tuple[float, float, float]:
    """Return bytes for each parameter, bytes sent, and seconds, the most of any rank."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = []
    for rank in range(RANKS):
        here, there = context.Pipe()
        arguments = (there, store.port, rank, shards, optimizer)
        context.Process(target=measure, args=arguments, daemon=True).start()
        pipes.append(here)
    answers = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(None)
    peak, sent, seconds = (max(values) for values in zip(*answers, strict=True))
    return peak / (LAYERS * SIDE**2), sent, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results and the page")
    arguments = parser.parse_args()
    facts = harness.environment()
    found = {(s, name): measured(s, name) for name in ("sgd", "adam") for s in SHARDS}
    facts["load average after"] = harness.load_average()
    rows = []
    for shards in SHARDS:
        (sgd, sent, seconds), (with_adam, more, _) = found[shards, "sgd"], found[shards, "adam"]
        grid = f"{RANKS // shards} × {shards}" if shards > 1 else "4, whole"
        rows.append([grid, f"{sgd:.1f}", f"{with_adam:.1f}", f"{sent:,}", f"{more:,}"])
        rows[-1].append(f"{seconds:.2f}")
    head = ["task groups × shards", "bytes of memory, SGD", "Adam (β1 = 0)"]
    head += ["bytes to other groups, SGD", "Adam", "seconds, SGD"]
    table = harness.markdown_table(head, rows)
    memory = {shards: found[shards, "sgd"][0] for shards in SHARDS}
    computed = paper_scaling.sharded_text(memory)
    print(table, "", computed, sep="\n")
    if arguments.write:
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        said = f"`python benchmarks/sharded.py --write`: {listed}."
        kept = {f"{shards} {name}": values for (shards, name), values in found.items()}
        text = f"{table}\n\n{computed}"
        harness.write("sharded", "Shards of φ", text, facts, {}, measured=kept)
        harness.refresh(PAGE, "sharded", f"{table}\n\n{said}")
        harness.refresh(PAGE, "computed-sharded", computed)


if __name__ == "__main__":
    main()
