"""A training in a process of its own, for tests that stop it from outside: long_run.py FOLDER."""

import sys

import torch

from koi import Koi, linear
from toys import Regressions, small_net


def make():
    """Return a learner at its beginning, and its tasks."""
    torch.manual_seed(0)
    koi = Koi(
        small_net(),
        step_size=0.02,
        num_steps=2,
        num_iterations=200,
        meta_step_size=linear(1.0, 0.0),
        inner_optimizer="adam",
        seed=0,
    )
    return koi, Regressions()


def tell(koi, record):
    print(record.iteration, flush=True)


if __name__ == "__main__":
    koi, tasks = make()
    koi.train(tasks, callbacks=[tell], checkpoint_dir=sys.argv[1], checkpoint_every=1, resume=True)
