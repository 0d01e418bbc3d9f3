"""Koi's engines on a GPU against the plain loop on the CPU: one row for each case, as it comes.

python benchmarks/equality.py --device cuda --out benchmarks/results/gpu

Everything that training leaves (φ, buffers, moments, history) and the loss curves of an evaluation,
in float64, after 6 meta-iterations from one start with one seed. Rows that are in the folder's
equality.csv already are not computed again.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from engine_toys import ALGORITHMS, NETS, OPTIMIZERS, Fits, everything, trained
from koi.fewshot import Episodes, LabelledData

BOUND = 1e-10
HEAD = ["case", "engine", "equal", "largest difference", "CUDA graphs skipped", "seconds"]

# A compiled case takes ten seconds and more, so not all of them; each algorithm, optimizer and net
# is in some of the first.
COMPILED = [
    (("reptile", "adam carry", "conv"), "vectorized+compiled"),
    (("maml", "momentum", "mlp"), "compiled"),
    (("fomaml", "adam reset", "encoder"), "vectorized+compiled"),
    (("eigen-reptile", "sgd", "conv"), "compiled"),
    (("maml", "adam carry", "conv"), "vectorized+compiled"),
    (("reptile", "momentum", "encoder"), "compiled"),
    (("reptile", "adam carry", "conv"), "compiled"),
    (("eigen-reptile", "adam reset", "mlp"), "vectorized+compiled"),
    (("fomaml", "sgd", "conv"), "compiled"),
    (("maml", "sgd", "encoder"), "vectorized+compiled"),
]
UNCOMPILED = [
    (case, engine)
    for case, engine in product(product(ALGORITHMS, OPTIMIZERS, NETS), ["vectorized", "eager"])
]
QUICK = [(case, engine) for case, engine in UNCOMPILED if case[1:] == ("adam carry", "conv")]


class OnDevice:
    """Tasks that are drawn one by one, on a device."""

    def __init__(self, tasks: Any, device: str) -> None:
        self.tasks, self.device = tasks, device

    def sample(self) -> Any:
        task = self.tasks.sample()
        values = {each.name: getattr(task, each.name).to(self.device) for each in fields(task)}
        return replace(task, **values)


def outcome(case: tuple[str, str, str], engine: str, device: str) -> Any:
    """What training and an evaluation give in an engine on a device."""
    algorithm, optimizer, net = case
    make, shape = NETS[net]
    torch.manual_seed(0)
    start, tasks = make().to(device), OnDevice(Fits(shape), device)
    settings = {"num_iterations": 6, "algorithm": algorithm, **OPTIMIZERS[optimizer]}
    if algorithm == "maml" and settings["inner_optimizer"] == "adam":
        # through Adam's first step g / (|g| + ε), MAML makes of rounding what it likes
        settings["inner_optimizer"] = partial(torch.optim.Adam, eps=0.1)
    learner = trained(engine, start, tasks, **settings)
    return everything(learner), learner.evaluate(tasks, 4).losses


def distance(found: Any, expected: Any) -> float:
    """The largest difference between two results of one form."""
    numbers = [tree_leaves(tree_map(as_tensor, each)) for each in (found, expected)]
    pairs = list(zip(*numbers, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def as_tensor(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().double()


def engines_row(case: tuple[str, str, str], engine: str, device: str) -> list[str]:
    """Compare one case in one engine with the plain loop on the CPU."""
    from torch._dynamo.utils import counters  # some seconds, which only this needs

    began = time.perf_counter()
    counters.clear()
    found = distance(outcome(case, engine, device), outcome(case, "eager", "cpu"))
    skipped = counters["inductor"]["cudagraph_skips"] if "compiled" in engine else "–"
    equal = "yes" if found <= BOUND else "**no**"
    return [equal, f"{found:.1e}", f"{skipped}", f"{time.perf_counter() - began:.1f}"]


def episodes_row(device: str) -> list[str]:
    """Compare a seed's episodes with the CPU's; on a GPU nothing of the draw waits for it."""
    began = time.perf_counter()
    images = torch.rand(40 * 20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.5
    data, drawn = LabelledData(images, [f"class {i}" for i in range(40)], [20] * 40), []
    for place in ("cpu", device):
        episodes = Episodes(data, 5, 10, 1, batch_size=10, device=place)
        torch.manual_seed(1)
        episodes.sample_batch(5)  # a first call may load kernels, for which torch waits
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            drawn.append(episodes.sample_batch(5))
        finally:
            if place == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    tensors = [[x for x in vars(task).values() if isinstance(x, Tensor)] for task in drawn]
    pairs = zip(*tensors, strict=True)
    found = max(float((a - b.cpu()).abs().max()) for a, b in pairs)
    equal = "yes" if found == 0 else "**no**"
    return [equal, f"{found:.1e}", "–", f"{time.perf_counter() - began:.1f}"]


def rows(device: str, quick: bool) -> Iterator[tuple[list[str], Any]]:
    """The names of each row, and what computes it."""
    yield ["episodes of a seed", "drawn on the device"], partial(episodes_row, device)
    cases = QUICK if quick else UNCOMPILED
    if device != "cpu":  # a processor's compiled engines are compared by the tests
        cases = [*(COMPILED[:1] if quick else COMPILED), *cases]
    for case, engine in cases:
        yield [", ".join(case), engine], partial(engines_row, case, engine, device)


def computed(compute: Any) -> list[str]:
    """The cells of a row, or what went wrong."""
    try:
        return compute()
    except Exception as error:
        return ["**no**", f"{type(error).__name__}: {error}".splitlines()[0][:200], "–", "–"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--out", type=Path, required=True, help="where the tables go")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "equality.csv"
    kept = list(csv.reader(table.open(encoding="utf-8", newline="")))[1:] if table.exists() else []
    for names, compute in rows(options.device, options.quick):
        if names in [row[:2] for row in kept]:
            continue
        kept.append([*names, *computed(compute)])
        print(" | ".join(kept[-1]), flush=True)
        harness.write_csv(table, HEAD, kept)
        text = harness.markdown_table(HEAD, kept)
        table.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    sys.exit(any(row[2] != "yes" for row in kept))


if __name__ == "__main__":
    main()
