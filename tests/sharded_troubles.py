"""What meets one of the ranks that hold a sharded φ, or what each of them was given alone."""

import os
import shutil
import signal
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharded_runs
from koi import Koi, KoiError
from koi.training import sharded
from sharded_runs import in_float64, learner, net, whole
from toys import Regression, Regressions


def fail():
    raise ValueError("no luck")


TROUBLES = {
    "raises": fail,
    "Ctrl-C": lambda: signal.raise_signal(signal.SIGINT),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


class Ended(NamedTuple):
    """How a training ended on a rank."""

    error: str
    text: str
    iteration: int
    phi: dict[str, torch.Tensor]
    seen: dict[str, torch.Tensor]


def train(folder, callbacks=(), tasks=None, every=1, resume=True, **settings):
    """Train two shards of φ, or go on; return how it ended."""
    koi, error, seen = in_float64(learner)("fomaml", 2, **settings), None, {}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    look = lambda koi, record: seen.update(whole(koi.model))  # noqa: E731
    options = {} if folder is None else {"checkpoint_every": every, "resume": resume}
    try:
        in_float64(koi.train)(
            tasks or Regressions(), callbacks=[look, *callbacks], checkpoint_dir=folder, **options
        )
    except BaseException as caught:
        error = caught
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    return Ended(type(error).__name__, text, koi.iteration, whole(koi.model), seen)


def evaluates_alone(rank, victim, folder):
    """Let a callback evaluate on one rank only, and others on all; then go on."""

    def evaluate(koi, record):
        if record.iteration != 1 or rank == victim:
            koi.evaluate(Regressions(), num_tasks=2)

    return train(folder, [evaluate]), train(folder, [lambda koi, record: None])


def in_a_callback(rank, trouble, victim, folder):
    """Let a callback meet with trouble on one rank; then go on."""

    def callback(koi, record):
        if rank == victim and record.iteration == 1:
            TROUBLES[trouble]()

    return train(folder, [callback]), train(folder, [lambda koi, record: None])


class Troubled(Regressions):
    """On one rank a loss goes wrong, once, at the first step of a task."""

    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble

    def sample(self):
        given = super().sample()
        task = TroubledTask(given.inputs, given.targets)
        if torch.initial_seed() == sharded_runs.Bads.seed:
            task.trouble, self.trouble = self.trouble, None
        return task


class TroubledTask(Regression):
    trouble = None

    def loss(self, model):
        loss = super().loss(model)
        if self.trouble == "NaN":
            return loss * float("nan")
        if self.trouble is not None:
            TROUBLES[self.trouble]()
        return loss


def in_a_loss(rank, trouble, victim, folder):
    return train(folder, tasks=Troubled(trouble if rank == victim else None)), train(folder)


def given_alone(rank, options):
    """Give each rank options of its own."""
    return train(**options[rank])


def loses_what_a_rank_wrote(rank, folder):
    """Let the files of one rank not be there when all is said to be written, as after a cut."""
    digest = sharded._digest

    def lose(path):
        found = digest(path)
        if rank == 1:
            path.unlink()
        return found

    with mock.patch.object(sharded, "_digest", lose):
        return train(folder)


def damaged(rank, folder, name):
    """Flip one bit of a file of the newest checkpoint, and go on; with every file, from none."""
    dist.barrier()
    if rank == 0:
        for path in sorted(folder.glob("*.shards"))[-1:] if name else folder.glob("*.shards"):
            file = path / (name or "sha256.json")
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    dist.barrier()
    return train(folder, num_iterations=5)


def unlike(rank, what):
    """Make a model that is sharded in part, or otherwise on each rank; return what is said."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("tasks", "shards"))
    model = net()
    if what == "shape" and rank == 1:
        model[0], model[1] = torch.nn.Linear(3, 5, bias=False), torch.nn.Identity()
    if what == "layer" or (what == "layers" and rank == 1):
        fully_shard(model[0], mesh=mesh["shards"])
    if what in ("layers", "shape") or (what == "rank" and rank == 1):
        fully_shard(model, mesh=mesh["shards"])
    try:
        Koi(model, **sharded_runs.SETTINGS, algorithm="fomaml", seed=0).train(Regressions())
    except KoiError as error:
        return type(error).__name__, str(error)
    return None


def of_another_kind(rank, folder):
    """Go on in the folder of a whole model with shards, and the other way round."""
    koi = in_float64(learner)("fomaml")
    found = []
    for kind, make in (("whole", lambda: koi), ("shards", lambda: learner("fomaml", 2))):
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            other = "shards" if kind == "whole" else "safetensors"
            (folder / f"iteration-000000002.{other}").mkdir()
        dist.barrier()
        try:
            make().train(Regressions(), checkpoint_dir=folder, resume=True)
        except KoiError as error:
            found.append(str(error))
    return found
