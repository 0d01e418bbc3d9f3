"""A training in a process of its own, for tests that stop it from outside."""

import torch

from koi import Koi, linear
from toys import Regressions, small_net

# So near to its end it waits, however late it is stopped.
LAST = 190


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


def run(folder, pipe):
    """Train, and tell of each meta-iteration."""

    def tell(koi, record):
        pipe.send(record.iteration)
        if record.iteration >= LAST:
            pipe.recv()  # whoever started it has come to stopping it

    koi, tasks = make()
    koi.train(tasks, callbacks=[tell], checkpoint_dir=folder, checkpoint_every=1, resume=True)
