"""What our recipe for Omniglot is worth on new intents: before and after, on 300 episodes.

python benchmarks/new_intents.py data_full.json     twenty minutes on one core

The example's network (examples/intents.py), 20 ways and one sentence each. Before: Reptile as the
example trains it. After: MAML through one SGD step on one sentence of each intent, with a learned
rate for each layer, and Adam outside falling to 0. Step sizes and numbers of steps are chosen on
the validation intents, on 30 episodes; the test's 300 are the same for all.
"""

import argparse
import sys
import time
from pathlib import Path

import harness
import torch

from koi import Koi, linear
from koi.fewshot import Episodes

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import intents

NUM_WAYS, NUM_TRIALS = 20, 30
BEFORE = {"step_size": 0.5, "num_steps": 4, "meta_batch_size": 2}
AFTER = {
    "step_size": 0.5,
    "num_steps": 1,
    "meta_batch_size": 4,
    "algorithm": "maml",
    "learn_step_size": "layer",
    "meta_step_size": linear(1.0, 0.0),
}


def trained(start: intents.Intents, episodes: Episodes, num_iterations: int, settings: dict) -> Koi:
    koi = Koi(start, num_iterations=num_iterations, seed=0, **intents.ADAM, **settings)
    koi.train(episodes)
    return koi


def accuracy(koi: Koi, episodes: Episodes, num_tasks: int, num_steps: int) -> torch.Tensor:
    koi.chunk_size, koi.seed = 10, 1
    return koi.measure(episodes, intents.Intents.accuracy, num_tasks, num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    training, validation, test = intents.read_intents(given.data).split(90, 30, 30)
    parts = [Episodes(part, NUM_WAYS, 1, 2, 20) for part in (validation, test)]
    frozen = intents.Intents(NUM_WAYS, training)
    nearest = intents.measure(frozen, intents.Intents.frozen, parts[1], given.tasks)[:, 0]
    rows = [["frozen, nearest class mean", "", "", shown(nearest)]]
    for name, settings, episodes in (
        ("Reptile, as the example", BEFORE, Episodes(training, NUM_WAYS, 4, batch_size=20)),
        ("MAML, our recipe", AFTER, Episodes(training, NUM_WAYS, 1, 4, 20)),
    ):
        began = time.perf_counter()
        start = intents.Intents(NUM_WAYS, training)
        koi = trained(start, episodes, given.iterations, settings)
        seconds = time.perf_counter() - began
        trials = {n: accuracy(koi, parts[0], NUM_TRIALS, n).mean() for n in (1, 2, 4)}
        steps = max(trials, key=trials.__getitem__)
        found = shown(accuracy(koi, parts[1], given.tasks, steps))
        rows.append([name, str(steps), f"{seconds:.0f}", found])
        print(*rows[-1], sep="\t", flush=True)
        means = intents.measure(koi.model, intents.Intents.frozen, parts[1], given.tasks)[:, 0]
        rows.append([f"{name}: its start, nearest class mean", "0", "", shown(means)])
        print(*rows[-1], sep="\t", flush=True)
    head = ["20-way 1-shot", "steps", "training, s", "accuracy, %"]
    print(harness.markdown_table(head, rows), harness.facts_list(harness.environment()), sep="\n\n")


def shown(right: torch.Tensor) -> str:
    return f"{100 * right.mean():.1f} ± {196 * right.std() / len(right) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
