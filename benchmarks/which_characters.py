"""How far a run's accuracies would move with other test characters, of which 423 were drawn.

python benchmarks/which_characters.py RUN [--tasks 10000]

The interval of a table, ± 1.96 s / √n over n tasks, is of these characters: more tasks narrow it,
and whoever splits Omniglot anew is outside of it. An accuracy over all tasks of N of C characters
is a U-statistic, so that for another C characters (Hoeffding 1948, eq. 5.13, first order)

    variance = N² / C · Var_c(a_c),    a_c the mean over the tasks in which character c is.

Of Var_c what comes of so few tasks for each character is taken off.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koi.fewshot import LabelledData
from koi.fewshot.accuracy import both_ways
from koi.fewshot.data import scaled
from koi.lab.runs import Run
from koi.lab.runs.measuring import chosen_checkpoint, measuring_learner


class Seen:
    """What a task's adapted model gets right, and which classes it was about."""

    def __init__(self, data: LabelledData) -> None:
        self.number = {}
        for index in range(len(data.classes)):
            for example in range(data.counts[index]):
                image = data.take(torch.tensor([index]), torch.tensor([example]))
                self.number[_key(image[0])] = index

    def __call__(self, model: nn.Module, task: Any) -> Tensor:
        fractions = both_ways(model, task)
        classes = sorted({self.number[_key(image)] for image in task.query_inputs})
        return torch.cat([fractions, torch.tensor(classes, dtype=fractions.dtype)])


def _key(image: Tensor) -> bytes:
    return scaled(image).numpy().tobytes()


def spread(correct: Tensor, classes: Tensor, num_classes: int) -> tuple[float, float]:
    """Return the standard errors of a mean: over tasks, and with other characters.

    Args:
        correct: the fraction of each task that is right, shape (T,).
        classes: which characters are in each, shape (T, N).
        num_classes: how many there are, C.
    """
    means, noise = [], []
    for number in range(num_classes):
        found = correct[(classes == number).any(1)]
        if len(found) > 1:
            means.append(found.mean())
            noise.append(found.var() / len(found))
    between = torch.stack(means).var() - torch.stack(noise).mean()
    other = classes.shape[1] * math.sqrt(max(between.item(), 0.0) / num_classes)
    return (correct.var() / len(correct)).sqrt().item(), other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--tasks", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(given.run)
    config = run.config()
    test = config.splits().test
    metric = Seen(test)
    for shots in given.shots:
        learner = measuring_learner(chosen_checkpoint(run), config, shots)
        learner.compile = True
        episodes = config.recipe.test_episodes(test, shots)
        found = learner.measure(episodes, metric, given.tasks)
        for column, way in enumerate(("transductive", "inductive")):
            correct = found[:, column].double()
            errors = spread(correct, found[:, 2:].long(), len(test.classes))
            tasks, characters = (196 * error for error in errors)
            print(
                f"{shots} shots, {way}: {100 * correct.mean():.2f} ± {tasks:.2f} over {len(found)} "
                f"tasks, ± {characters:.2f} over characters",
                flush=True,
            )


if __name__ == "__main__":
    main()
