"""What each habit of the paper's code is worth on Omniglot, 5-way 1-shot: docs/results.md.

python benchmarks/habits.py DATA                          all of them, half an hour on one core
python benchmarks/habits.py DATA --iterations 100 --tasks 50 --variants none all

DATA is what `koi train --data` takes. Each variant is trained alike and measured on the same test
tasks; rows are printed as they are done, and written to results/habits.csv.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
from torch import nn

from koi import Koi
from koi.fewshot import Accuracy, Splits, accuracy
from koi.problems import omniglot
from koi.recipes import RECIPES, FewShotRecipe

RECIPE = RECIPES["omniglot-5way"]
CHUNK = 20


def default_values(net: nn.Module) -> None:
    """Give every layer PyTorch's own initial values."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()


def default_epsilon(net: nn.Module) -> None:
    """Give BatchNorm PyTorch's ε."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5


@dataclass(frozen=True)
class Variant:
    """The recipe with some habits left out: changes of the network, and of the inner state."""

    title: str
    changes: tuple[Callable[[nn.Module], None], ...] = ()
    inner_state: str = "carry"


VARIANTS = {
    "none": Variant("nothing: the recipe"),
    "values": Variant("PyTorch's initial values", (default_values,)),
    "epsilon": Variant("PyTorch's BatchNorm ε, 1e-5", (default_epsilon,)),
    "state": Variant("a fresh Adam for each task", inner_state="reset"),
    "all": Variant("all three", (default_values, default_epsilon), "reset"),
}


def measured(variant: Variant, recipe: FewShotRecipe, splits: Splits, num_tasks: int) -> Accuracy:
    """Train a variant and return its accuracy on test tasks."""
    torch.manual_seed(0)
    net = recipe.model()
    for change in variant.changes:
        change(net)
    recipe = replace(recipe, inner_state=variant.inner_state)
    koi = Koi(net, **recipe.settings(), seed=0, chunk_size=CHUNK)
    koi.train(recipe.training_episodes(splits.train))
    tasks = recipe.test_episodes(splits.test, num_shots=1)
    return accuracy(koi, tasks, num_tasks, recipe.adaptation(1).num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    recipe = replace(RECIPE, num_iterations=arguments.iterations)
    splits = omniglot.load(arguments.data)
    print(*(f"{key}: {value}" for key, value in harness.environment().items()), sep="\n")
    rows = []
    for name in arguments.variants:
        began = time.perf_counter()
        found = measured(VARIANTS[name], recipe, splits, arguments.tasks)
        seconds = time.perf_counter() - began
        print(f"{VARIANTS[name].title}: {found}, {seconds:.0f} s", flush=True)
        for way, (mean, interval) in (
            ("transductive", found.transductive),
            ("inductive", found.inductive),
        ):
            rows.append([VARIANTS[name].title, arguments.iterations, way, mean, interval])
    with (harness.RESULTS / "habits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["left out", "iterations", "way", "accuracy", "interval"])
        writer.writerows([*row[:3], f"{row[3]:.4f}", f"{row[4]:.4f}"] for row in rows)


if __name__ == "__main__":
    main()
