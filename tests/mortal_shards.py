"""A training of a sharded model in which one rank is killed, or fails, once: run by torchrun.

The script is that of a user of FSDP; of Koi it knows no more than that there is a folder.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import sharded_runs
from toys import Regressions

LENGTH = 12


def train(folder, victim=None, at=None, how="dies"):
    """Train on the ranks that there are, two shards to a group; return the learner."""
    koi = sharded_runs.learner("fomaml", 2, num_iterations=LENGTH)
    mark = None if folder is None else Path(folder) / "died"

    def die(koi, record):
        if dist.get_rank() == victim and record.iteration == at and not mark.exists():
            mark.write_text("")
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "callback":
                raise ZeroDivisionError
            koi.model[2].register_forward_hook(lambda *_: 1 / 0)

    options = {} if folder is None else {"checkpoint_dir": folder, "checkpoint_every": 2}
    koi.train(Regressions(), callbacks=[die], resume=folder is not None, **options)
    return koi


def alone():
    """Return φ of one process to which nothing happens."""
    koi = sharded_runs.learner("fomaml", num_iterations=LENGTH)
    koi.train(Regressions())
    return sharded_runs.whole(koi.model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    koi = train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    phi = sharded_runs.whole(koi.model)
    if dist.get_rank() == 0:
        torch.save(phi, Path(sys.argv[1]) / "phi.pt")
    dist.destroy_process_group()
