"""What each setting is worth on the paper's sine waves: the tables of docs/choosing.md.

python benchmarks/choices.py                        all of them, some twenty minutes on one core
python benchmarks/choices.py algorithm --seeds 0    one table, from one seed
"""

import argparse
import warnings
from functools import partial
from statistics import mean

import torch

from koi import Koi, linear
from koi.models import sine_mlp
from koi.problems import Sines

STEPS = (1, 8, 32)
MANY, FEW = Sines(num_points=50), Sines(num_points=10)  # points of each wave to learn from
SHARED = {"step_size": 0.02, "num_steps": 5, "meta_step_size": linear(0.1, 0.0)}

# torch's Adam without its first moment, as in the Reptile paper's code
adam_0 = partial(torch.optim.Adam, betas=(0.0, 0.999))
meta_adam = partial(torch.optim.Adam, lr=1e-3)

TABLES = {
    "algorithm": {
        "none: random weights": {"num_iterations": 0},
        "joint training (`num_steps=1`)": {"num_steps": 1},
        "`reptile`": {},
        "`reptile`, meta-optimizer Adam": {"meta_optimizer": meta_adam},
        "`fomaml`, meta-optimizer Adam": {"algorithm": "fomaml", "meta_optimizer": meta_adam},
        "`maml`, meta-optimizer Adam": {"algorithm": "maml", "meta_optimizer": meta_adam},
    },
    "steps": {f"{k}": {"num_steps": k} for k in (2, 5, 10, 20)},
    "epsilon": {
        "0.01": {"meta_step_size": 0.01},
        "0.1": {"meta_step_size": 0.1},
        "0.1 → 0": {"meta_step_size": linear(0.1, 0.0)},
        "1 → 0": {"meta_step_size": linear(1.0, 0.0)},
        "1": {"meta_step_size": 1.0},
    },
    "optimizer": {
        "SGD, η = 0.02": {},
        "Adam, η = 0.003": {"inner_optimizer": "adam", "step_size": 0.003},
        "Adam, η = 0.003, `reset`": {
            "inner_optimizer": "adam",
            "step_size": 0.003,
            "inner_state": "reset",
        },
        "Adam, β₁ = 0, η = 0.003": {"inner_optimizer": adam_0, "step_size": 0.003},
        "Adam, β₁ = 0, η = 0.003, `reset`": {
            "inner_optimizer": adam_0,
            "step_size": 0.003,
            "inner_state": "reset",
        },
    },
}


def errors(settings, seed, num_iterations, num_tasks):
    """The mean squared error on new waves after each of STEPS."""
    torch.manual_seed(seed)
    settings = {**SHARED, "num_iterations": num_iterations, **settings}
    koi = Koi(sine_mlp(), seed=seed, **settings)
    # FOMAML and MAML learn from the query set: all 50 points, after adapting to the 10 seen
    koi.train(MANY if koi.algorithm == "reptile" else FEW)
    curve = koi.evaluate(FEW, num_tasks, num_steps=max(STEPS)).mean
    return [curve[step] for step in STEPS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=500)
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # joint training is meant here
    for table in options.tables or TABLES:
        print(f"\n| {table} | " + " | ".join(f"{k} step{'s' * (k > 1)}" for k in STEPS) + " |")
        print("| :-- " + "| --: " * len(STEPS) + "|")
        for name, settings in TABLES[table].items():
            runs = [
                errors(settings, seed, options.iterations, options.tasks) for seed in options.seeds
            ]
            cells = (
                f"{mean(column):.2f} ({min(column):.2f}–{max(column):.2f})"
                for column in zip(*runs, strict=True)
            )
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
