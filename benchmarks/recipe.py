"""What each choice of omniglot-5way-koi is worth, on validation characters: docs/results.md.

python benchmarks/recipe.py DATA                              all of them, two hours on one core
python benchmarks/recipe.py DATA --choices paper recipe --seeds 0 1 2
python benchmarks/recipe.py DATA --iterations 10 --tasks 5 --choices recipe

DATA is what `koi train --data` takes. Each is trained alike and measured on the same tasks of 200
training characters that are set apart; rows are printed as they are done, and written to
results/recipe.csv. No test character is looked at.
"""

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch

from koi import Koi, linear
from koi.fewshot import Accuracy, Splits, accuracy
from koi.problems import omniglot
from koi.recipes import RECIPES, Adaptation

# As it was tested until 10 steps were found to be better, here ("tested after 10 steps").
OURS = replace(RECIPES["omniglot-5way-koi"], adaptations={1: Adaptation(25, 3)})
FOMAML = replace(OURS, algorithm="fomaml")
REPTILE = replace(RECIPES["omniglot-5way"], torch_defaults=True)
TESTED_AT = 0.003  # where the inner rate falls over the training

# Of each choice: the recipe, and what of `koi.Koi`'s settings is another in training.
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "recipe": (OURS, {}),
    "tested after 1 step": (replace(OURS, adaptations={1: Adaptation(25, 1)}), {}),
    "tested after 10 steps": (replace(OURS, adaptations={1: Adaptation(25, 10)}), {}),
    "paper": (RECIPES["omniglot-5way"], {}),
    "fomaml": (FOMAML, {}),
    "fomaml, 3 steps of 0.2": (
        replace(FOMAML, num_steps=3, step_size=0.2, adaptations={1: Adaptation(25, 5)}),
        {},
    ),
    "fomaml, 5 shots": (replace(FOMAML, num_shots=5, num_queries=5, meta_batch_size=5), {}),
    "fomaml, 5 steps of Adam": (
        replace(RECIPES["omniglot-5way-fomaml"], num_shots=5, torch_defaults=True, meta_rate=0.003),
        {"step_size": linear(0.005, 0.001)},
    ),
    "reptile": (REPTILE, {"step_size": linear(0.005, 0.001)}),
    "reptile, constant rate": (replace(REPTILE, step_size=0.003), {}),
    "initial values of the paper": (replace(OURS, torch_defaults=False), {}),
    "rate 0.1": (replace(OURS, step_size=0.1), {}),
    "rate 1": (replace(OURS, step_size=1.0), {}),
    "outer rate 0.001": (replace(OURS, meta_rate=0.001), {}),
    "outer rate 0.01": (replace(OURS, meta_rate=0.01), {}),
    "constant outer rate": (OURS, {"meta_step_size": 1.0}),
    "10 queries": (replace(OURS, num_queries=10), {}),
    "5 shots": (replace(OURS, num_shots=5, num_queries=5), {}),
    "2 steps": (replace(OURS, num_steps=2), {}),
    "5 tasks": (replace(OURS, meta_batch_size=5), {}),
    "fixed rates": (replace(OURS, learn_step_size=None), {}),
    "5 tasks, fixed rates": (replace(OURS, meta_batch_size=5, learn_step_size=None), {}),
    "5 tasks, a rate for each number": (
        replace(OURS, meta_batch_size=5, learn_step_size="parameter"),
        {},
    ),
    "mean of φ": (OURS, {"average": 0.99}),
}


def trained(
    choice: str, splits: Splits, num_iterations: int, seed: int, compile: bool = True
) -> Koi:
    """Return the learner of a choice after a whole training of so many meta-iterations."""
    recipe, more = CHOICES[choice]
    recipe = replace(recipe, num_iterations=num_iterations)
    torch.manual_seed(seed)
    koi = Koi(recipe.model(), **recipe.settings() | {"seed": seed, "compile": compile} | more)
    koi.train(recipe.training_episodes(splits.train))
    return koi.averaged() if "average" in more else koi


def measured(koi: Koi, choice: str, splits: Splits, num_shots: int, num_tasks: int) -> Accuracy:
    """Return its accuracy on validation tasks, the same for all."""
    recipe, more = CHOICES[choice]
    koi.compile, koi.chunk_size, koi.seed, koi.on_nonfinite = False, 20, 0, "skip"
    episodes = recipe.test_episodes(splits.validation, num_shots)
    num_steps = recipe.adaptation(num_shots).num_steps
    step_size = TESTED_AT if "step_size" in more else None
    return accuracy(koi, episodes, num_tasks, num_steps, step_size)


def main() -> None:
    """Train and measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "recipe.csv")
    given = parser.parse_args()
    with given.out.open("a", newline="", encoding="utf-8") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        for seed in given.seeds:
            splits = omniglot.load(given.data, num_validation=200, seed=seed)
            done: Any = None
            for choice in given.choices:
                recipe, more = CHOICES[choice]
                training = replace(recipe, adaptations=OURS.adaptations), more
                if training != done:  # one that differs in the test alone follows it
                    began = time.perf_counter()
                    koi = trained(choice, splits, given.iterations, seed)
                    seconds, done = time.perf_counter() - began, training
                row: list[Any] = [choice, seed, given.iterations, given.tasks, f"{seconds:.0f}"]
                for num_shots in given.shots:
                    found = measured(koi, choice, splits, num_shots, given.tasks)
                    for mean, half in (found.inductive, found.transductive):
                        row += [f"{100 * mean:.2f}", f"{100 * half:.2f}"]
                write(row)
                file.flush()
                print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
