"""A script for torchrun in which a rank kills itself once: mortal_run.py FOLDER RANK ITERATION.

There is nothing of ranks in it but the killing.
"""

import os
import signal
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
        num_iterations=40,
        meta_step_size=linear(1.0, 0.0),
        meta_batch_size=3,
        inner_optimizer="adam",
        seed=0,
    )
    return koi, Regressions()


def train(rank, folder=None, callbacks=()):
    """Train, in the folder if there is one; return φ by name."""
    koi, tasks = make()
    options = {} if folder is None else {"checkpoint_every": 10, "resume": True, "log_dir": folder}
    koi.train(tasks, callbacks=callbacks, checkpoint_dir=folder, **options)
    return koi.model.state_dict()


if __name__ == "__main__":
    folder, victim, last = sys.argv[1], *map(int, sys.argv[2:])

    def die(koi, record):
        me = int(os.environ["RANK"]), record.iteration, os.environ["TORCHELASTIC_RESTART_COUNT"]
        if me == (victim, last, "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    train(None, folder, [die])
