"""A folder of images by `koi train`'s recipe, and by the paper's: what each is worth on its test.

python benchmarks/own_folder.py FOLDER --shots 1 5 --seeds 0 1 2

Each seed has other weights, tasks and test classes. Both recipes are trained for as many
meta-iterations and measured on the same tasks.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from koi.lab.runs import Config, Run, measure, train
from koi.recipes import RECIPES, FewShotRecipe, own_folder


def by_the_paper(recipe: FewShotRecipe, num_shots: int) -> FewShotRecipe:
    """Return the paper's Reptile recipe for what another is for."""
    paper = RECIPES["omniglot-5way"]
    kept = {name: getattr(recipe, name) for name in ("name", "problem", "num_iterations")}
    return replace(paper, **kept, adaptations={num_shots: paper.adaptation(num_shots)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--shots", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for shots in given.shots:
        for seed in given.seeds:
            recipe, classes = own_folder(given.folder, 5, shots, seed=seed)
            ours = replace(recipe, num_iterations=given.iterations, patience=None)
            for name, chosen in {"paper": by_the_paper(ours, shots), "ours": ours}.items():
                config = Config(chosen, data=str(given.folder), seed=seed, classes=classes)
                with tempfile.TemporaryDirectory() as place:
                    run = Run.begun(place, config)
                    began = time.process_time()
                    train(run)
                    seconds = time.process_time() - began
                    found = measure(run, shots, given.tasks, False)
                told = " / ".join(
                    f"{100 * mean:.1f} ± {100 * interval:.1f}"
                    for mean, interval in (found["inductive"], found["transductive"])
                )
                print(f"{shots} shots, seed {seed}, {name}: {told} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
