"""How much faster a meta-iteration is where only the head adapts: ANIL against MAML, by turns.

python benchmarks/roles.py --threads 1 --repetitions 10

Omniglot 5-way, 5 tasks of 10 images of each class in an inner step of 10, random images. Times are
the process's own (`time.process_time`), so that other work on the machine counts little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from harness import environment, markdown_table
from torch import nn

from koi import Koi
from koi.fewshot import Episodes
from koi.models import omniglot_net


def random_episodes(num_queries: int) -> Episodes:
    """Return 5-way episodes of random images, with so many queries of each class."""
    torch.manual_seed(0)
    images, labels = torch.rand(400, 1, 28, 28), torch.arange(20).repeat_interleave(20)
    return Episodes((images, labels), 5, 10, num_queries, batch_size=10)


def meta_iteration(num_steps: int, vectorize: bool, **roles: object) -> Callable[[], object]:
    """Return a function that does one meta-iteration."""
    torch.manual_seed(0)
    settings = {"algorithm": "maml", "meta_batch_size": 5, "seed": 0, "vectorize": vectorize}
    koi = Koi(omniglot_net(5), 0.01, num_steps, 10_000, **settings, **roles)  # type: ignore[arg-type]
    episodes = random_episodes(5)
    return lambda: koi.step(episodes)


def name_of_head() -> str:
    """Return the pattern of the last layer's names."""
    names = [name for name, part in omniglot_net(5).named_modules() if isinstance(part, nn.Linear)]
    return f"{names[-1]}.*"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for num_steps in (1, 5, 20):
        for vectorize in (False, True):
            pair = [
                meta_iteration(num_steps, vectorize, **roles)
                for roles in ({}, {"adapts": name_of_head()})
            ]
            quotients = []
            for turn in range(-1, given.repetitions):
                seconds = []
                for run in pair:
                    began = time.process_time()
                    run()
                    seconds.append(time.process_time() - began)
                if turn >= 0:
                    quotients.append(seconds[0] / seconds[1])
            low, middle, high = statistics.quantiles(quotients, n=4)
            engine = "vectorized" if vectorize else "eager"
            rows.append([engine, str(num_steps), f"{middle:.1f} ({low:.1f} to {high:.1f})"])
            print(*rows[-1], flush=True)
    print(markdown_table(["engine", "inner steps", "MAML / ANIL"], rows))
    print(environment())


if __name__ == "__main__":
    main()
