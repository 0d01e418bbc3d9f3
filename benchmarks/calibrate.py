"""What a network of `koi demo` may say it is sure of: fitted on validation characters.

python benchmarks/calibrate.py DATA [--checkpoint FILE] [--validation 100] [--seed 0]

DATA is Omniglot, as `koi train --data` takes it. Episodes of 3 to 5 characters, one example of
each, and two new drawings: one of them, and one of another character. On the characters that the
training set apart for validation (--validation and --seed as koi train was given them, so that the
network has not learned from them) it fits, for each initialisation and number of steps, the
temperature of the scores and a logistic regression that tells the two kinds of drawings apart;
writes them beside the checkpoint; and prints what they say of test characters.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi.fewshot import LabelledData
from koi.lab.demo import calibration
from koi.lab.demo.calibration import Reading, signs
from koi.lab.demo.classifier import SHIPPED, Classifier, seen
from koi.lab.demo.messages import MAX_STEPS
from koi.problems import omniglot

SHOWN = (0, 1, 3, 10)  # steps in the table
SURE = 0.9
NEVER = -1e6  # the score of a class that an episode does not have


class Episode:
    """Examples and two new drawings, of which every step notes scores and signs."""

    def __init__(self, images: Tensor, drawings: Tensor) -> None:
        self.images, self.drawings = images, drawings
        self.scores: list[Tensor] = []
        self.signs: list[Tensor] = []

    def loss(self, model: nn.Module) -> Tensor:
        number = len(self.images)
        with torch.no_grad():
            each = [seen(model, torch.cat([self.images, new[None]])) for new in self.drawings]
        scores = [scores[-1, :number] for scores, _ in each]
        self.scores.append(F.pad(torch.stack(scores), (0, 5 - number), value=NEVER))
        pairs = zip(scores, (features for _, features in each), strict=True)
        self.signs.append(torch.tensor([signs(*pair) for pair in pairs]))
        return F.cross_entropy(model(self.images)[:, :number], torch.arange(number))


def episodes(data: LabelledData, number: int, seed: int) -> Any:
    """Yield the images of each episode's examples, the two drawings, and the right class."""
    generator = torch.Generator().manual_seed(seed)
    for count in range(number):
        ways = 3 + count % 3
        classes = torch.randperm(len(data), generator=generator)[: ways + 1]
        pairs = torch.stack([torch.randperm(20, generator=generator)[:2] for _ in classes])
        right = int(torch.randint(ways, (), generator=generator))
        new = data.take(classes[[right, ways]], pairs[[right, ways], 1])
        yield data.take(classes[:ways], pairs[:ways, 0]), new, right


def collected(classifier: Classifier, start: str, data: LabelledData, number: int, seed: int):
    """Scores (episodes, steps, 2, 5), signs (episodes, steps, 2, 2), right classes (episodes,)."""
    found = []
    for images, new, right in episodes(data, number, seed):
        task = Episode(images, new)
        adapted = classifier.adapted(task, MAX_STEPS, start)
        task.loss(adapted)
        found.append((torch.stack(task.scores), torch.stack(task.signs), torch.tensor(right)))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def fitted(scores: Tensor, two_signs: Tensor, right: Tensor) -> Reading:
    """Fit a reading by maximum likelihood to what one step gave."""
    parts = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(right), 2)
    optimizer = torch.optim.LBFGS([parts], max_iter=500, line_search_fn="strong_wolfe")
    scores, two_signs = scores.double(), two_signs.double()

    def loss() -> Tensor:
        optimizer.zero_grad()
        odds = parts[1] + two_signs @ parts[2:]
        total = F.cross_entropy(scores[:, 0] / parts[0].exp(), right)
        total = total + F.binary_cross_entropy_with_logits(odds, target)
        total.backward()
        return total

    optimizer.step(loss)
    temperature, (offset, lead, distance) = parts[0].exp().item(), parts[1:].tolist()
    return Reading(*(round(value, 4) for value in (temperature, offset, lead, distance)))


def row(reading: Reading | None, scores: Tensor, two_signs: Tensor, right: Tensor) -> list[str]:
    """What is said of drawings of a class, and of drawings of none."""
    if reading is None:
        belief = scores.softmax(-1)
    else:
        known = torch.tensor([[reading.known(*pair) for pair in two] for two in two_signs.tolist()])
        belief = known.unsqueeze(-1) * reading.probabilities(scores)
    best, which = belief.max(-1)
    sure, said = best > SURE, best > 0.5
    shares = [
        (which[:, 0] == right).double().mean(),  # the likeliest class is the right one
        said[:, 0].double().mean(),  # a class is named, of one of them
        (said[:, 0] & (which[:, 0] != right)).double().mean(),  # and it is the wrong one
        said[:, 1].double().mean(),  # a class is named, of another character
        sure[:, 1].double().mean(),  # and with more than 90 %
        (which[:, 0] == right)[sure[:, 0]].double().mean(),  # right where it is sure of one
    ]
    return [f"{100 * share:.1f}" for share in shares]


HEAD = [
    *("start", "steps", "read", "right"),
    *("named", "of it wrong", "another named", "another, > 90 % sure", "right where > 90 % sure"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--validation", type=int, default=100, help="as in the training")
    parser.add_argument("--seed", type=int, default=0, help="as in the training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = omniglot.load(options.data, num_validation=options.validation, seed=options.seed)
    classifier = Classifier.load(options.checkpoint)
    readings, rows = {}, []
    for start in ("learned", "random"):
        scores, two, right = collected(classifier, start, splits.validation, options.episodes, 0)
        steps = range(MAX_STEPS + 1)
        readings[start] = [fitted(scores[:, step], two[:, step], right) for step in steps]
        scores, two, right = collected(classifier, start, splits.test, options.episodes, 1)
        for step in SHOWN:
            for how, reading in {"softmax": None, "calibrated": readings[start][step]}.items():
                cells = row(reading, scores[:, step], two[:, step], right)
                rows.append([start, f"{step}", how, *cells])
    command = shlex.join(["python", "benchmarks/calibrate.py", "DATA", *sys.argv[2:]])
    beside = options.checkpoint.with_suffix(".json")
    calibration.write(beside, options.checkpoint, readings, command=command)
    print(harness.markdown_table(HEAD, rows), harness.facts_list(harness.environment()), sep="\n\n")


if __name__ == "__main__":
    main()
