"""Koi's one-by-one engine against the loop of by_hand.py, in one process, by turns.

python benchmarks/one_by_one.py [--threads 1 2] [--repetitions 20] [--write]
"""

import argparse
from collections.abc import Callable
from functools import partial

import by_hand
import harness
import torch
from harness import Timing
from torch.nn import functional as F

from koi import Koi, SupervisedTask, linear
from koi.models import omniglot_net, sine_mlp
from koi.problems import Sines

SINE_ITERATIONS = 200
IMAGE_ITERATIONS = 2


class RandomImages:
    """Tasks of 50 random images of 5 classes, the size of the paper's 5-way 5-shot training."""

    def sample(self) -> SupervisedTask:
        images = torch.rand(50, 1, 28, 28)
        labels = torch.randint(5, (50,))
        key = torch.randint(2**62, ())
        return SupervisedTask(images, labels, images, labels, key, F.cross_entropy, batch_size=10)


def sine_contestants() -> dict[str, Callable[[], object]]:
    """The sine net: one task, 5 SGD steps of 10 points at 0.02, ε from 0.1 to 0."""
    hand = partial(
        by_hand.reptile,
        sine_mlp(),
        by_hand.sine_batches,
        F.mse_loss,
        partial(torch.optim.SGD, lr=0.02),
        SINE_ITERATIONS,
        1,
        0.1,
    )
    model, tasks = sine_mlp(), Sines()

    def ours() -> None:
        koi = Koi(model, 0.02, 5, SINE_ITERATIONS, meta_step_size=linear(0.1, 0), vectorize=False)
        koi.train(tasks, progress=False)

    return {"by hand": hand, "Koi": ours}


def image_contestants() -> dict[str, Callable[[], object]]:
    """The Omniglot net: 5 tasks, 5 Adam steps of 10 images at 0.001, ε from 1 to 0."""
    hand = partial(
        by_hand.reptile,
        omniglot_net(5),
        partial(by_hand.random_batches, (1, 28, 28)),
        F.cross_entropy,
        partial(torch.optim.Adam, lr=0.001, betas=(0.0, 0.999)),
        IMAGE_ITERATIONS,
        5,
        1.0,
    )
    model, tasks = omniglot_net(5), RandomImages()

    def ours() -> None:
        koi = Koi(
            model,
            0.001,
            5,
            IMAGE_ITERATIONS,
            meta_step_size=linear(1, 0),
            meta_batch_size=5,
            inner_optimizer=lambda params, lr: torch.optim.Adam(params, lr, betas=(0.0, 0.999)),
            inner_state="reset",  # as the loop by hand
            vectorize=False,
        )
        koi.train(tasks, progress=False)

    return {"by hand": hand, "Koi": ours}


CASES = {
    "sine net, 1 task, 5 SGD steps of 10": (sine_contestants, SINE_ITERATIONS, 0.6),
    "Omniglot net, 5 tasks, 5 Adam steps of 10": (image_contestants, IMAGE_ITERATIONS, 1.0),
}


def row(case: str, threads: int, timings: dict[str, Timing]) -> list[str]:
    """A row of the table: milliseconds for each meta-iteration, and the ratio."""
    _, num_iterations, bound = CASES[case]
    hand, ours = (timings[name].median / num_iterations * 1e3 for name in ("by hand", "Koi"))
    shown = str(harness.ratio(timings["Koi"], timings["by hand"]))
    return [case, str(threads), f"{hand:.2f}", f"{ours:.2f}", shown, f"{bound:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write to benchmarks/results")
    arguments = parser.parse_args()

    facts = harness.environment()
    rows, everything = [], {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for case, (contestants, *_) in CASES.items():
            torch.manual_seed(0)
            timings = harness.by_turns(contestants(), arguments.repetitions)
            everything[f"{case}, {threads} threads"] = timings
            rows.append(row(case, threads, timings))
            print(*rows[-1], sep=" | ", flush=True)
    facts["load average after"] = harness.load_average()
    head = ["", "threads", "by hand, ms", "Koi, ms", "Koi / by hand", "at most"]
    text = (
        "Wall time of one meta-iteration, sampling included: medians of "
        f"{arguments.repetitions} repetitions in one process, by turns; {harness.BRACKETS}. "
        "Made by `python benchmarks/one_by_one.py --write`.\n\n"
        + harness.markdown_table(head, rows)
    )
    print(text, *(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    if arguments.write:
        harness.write("one_by_one", "One task at a time", text, facts, everything)


if __name__ == "__main__":
    main()
