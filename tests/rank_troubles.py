"""What meets one of several ranks in the tests: errors, signals, other settings, an early end."""

import json
import os
import shutil
import signal
import time
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from koi.ranks import presence
from rank_runs import learner
from toys import Regression, Regressions, snapshot


def word():
    """Return where ranks leave word that their training has ended."""
    return dist.PrefixStore("ended", dist.group.WORLD.get_group_store())


def wait_for_the_others():
    while not word().check(["0", "2"]):
        time.sleep(0.05)


def fail():
    raise ValueError("no luck")


TROUBLES = {
    "loss": fail,
    "sample": fail,
    "callback": fail,
    "nan": lambda: float("nan"),
    "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "callback, SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hangs": wait_for_the_others,
}


class Troubled(Regressions):
    """Lets something happen at meta-iteration ``at``, in a loss or where its name says."""

    def __init__(self, koi, at, trouble):
        super().__init__()
        self.koi, self.at, self.trouble = koi, at, trouble

    def meet(self, where, done=0):
        """Return what is added to a loss."""
        first = str(self.trouble).partition(",")[0]
        place = first if first in ("sample", "callback") else "loss"
        if self.trouble is None or place != where or self.koi.iteration - done != self.at:
            return 0.0
        self.at = None  # once is enough
        return TROUBLES[self.trouble]() or 0.0

    def sample(self):
        self.meet("sample")
        task = super().sample()
        return Meeting(task.inputs, task.targets, self)

    def called(self, koi, record):
        self.meet("callback", done=1)


class Meeting(Regression):
    def __init__(self, inputs, targets, tasks):
        super().__init__(inputs, targets)
        self.tasks = tasks

    def loss(self, model):
        return super().loss(model) + self.tasks.meet("loss")


def in_trouble(rank, trouble, victim, at, folder, settings, every=None):
    """Train until trouble meets the victim; return how it ended."""
    koi = learner(**settings)
    tasks = Troubled(koi, at, trouble if rank == victim else None)
    error = None
    try:
        options = {} if folder is None else {"checkpoint_every": every, "resume": True}
        koi.train(tasks, callbacks=[tasks.called], checkpoint_dir=folder, **options)
    except BaseException as caught:
        error = caught
    word().set(str(rank), "")
    return Ended(
        koi.iteration,
        snapshot(koi.model),
        type(error).__name__,
        " ".join([str(error), *getattr(error, "__notes__", [])]),
        error.code if isinstance(error, SystemExit) else None,
    )


class Ended(NamedTuple):
    """How a training ended on a rank."""

    iteration: int
    phi: dict[str, torch.Tensor]
    error: str
    text: str
    code: int | None


def skipping(rank, at):
    """Train with all tasks of rank 1 skipped at one meta-iteration, or in one process the same."""
    koi = learner(inner_optimizer="adam", on_nonfinite="skip", seed=0, meta_batch_size=4)

    class Task(Regression):
        number = 0

        def loss(self, model):
            lost = koi.iteration == at and self.number >= 2
            return super().loss(model) * (float("nan") if lost else 1.0)

    class Numbered(Regressions):
        drawn = 0

        def sample(self):
            given = super().sample()
            task = Task(given.inputs, given.targets)
            task.number, self.drawn = self.drawn % 4, self.drawn + 1
            return task

    koi.train(Numbered())
    skipped = [record.num_skipped for record in koi.history]
    moments = koi.state_dict()["moments"]
    return {n: t.double() for n, t in snapshot(koi.model).items()}, moments, skipped


def out_of_step(rank):
    """A callback changes φ on one rank alone."""

    def callback(koi, record):
        if rank == 1 and record.iteration == 2:
            koi.model[0].weight.data[0, 0] += 1e-6

    with patch.dict(os.environ, TORCH_DISTRIBUTED_DEBUG="INFO"):
        learner(seed=0).train(Regressions(), callbacks=[callback])


def in_step(rank):
    with patch.dict(os.environ, TORCH_DISTRIBUTED_DEBUG="INFO"):
        koi = learner(seed=0)
        koi.train(Regressions())
    return koi.iteration


def with_settings_of_its_own(rank, name, *values, **options):
    """Train with one setting of the learner, or argument of train, that differs between ranks."""
    settings = {"seed": 0, "meta_step_size": 0.5}
    given = {name: values[rank]}
    if name in ("validate_every", "patience"):
        learner(**settings).train(Regressions(), validate=Regressions(), **given)
    else:
        learner(**settings | given).train(Regressions())


def never_comes(rank, seconds):
    """Rank 1 has left before; rank 0 waits."""
    if rank == 0:
        with patch.dict(os.environ, KOI_RANKS_SECONDS=seconds):
            learner(seed=0).train(Regressions())


def ends_between(rank, ended):
    """Rank 1 does not come to a second training; it has said that its process ends, or not."""
    koi = learner(seed=0)
    koi.train(Regressions())
    koi.num_iterations = 8
    if rank == 1:
        if ended:
            store = dist.group.WORLD.get_group_store()
            presence._say_goodbye(store, json.dumps([presence._machine(), os.getpid()]))
        else:
            time.sleep(2)  # measures, say
            koi.train(Regressions())
        return koi.iteration
    with patch.dict(os.environ, KOI_RANKS_SECONDS="0.5"):
        koi.train(Regressions())
    return koi.iteration


def rank_0_cannot_save(rank, folder):
    koi = learner(seed=0)

    def vanish(koi, record):
        if rank == 0 and record.iteration == 0:
            shutil.rmtree(folder)

    try:
        koi.train(Regressions(), None, [vanish], folder, checkpoint_every=2)
    except Exception as error:
        return koi.iteration, type(error).__name__, str(error)
    return None


def stopped_among_callbacks(rank, victim, folder):
    """Train with two callbacks, of which the second stops the victim once, and go on.

    Returns what they were called for since.
    """
    seen = []

    def first(koi, record):
        seen.append(("first", record.iteration))

    def second(koi, record):
        if rank == victim and record.iteration == 3:
            fail()
        seen.append(("second", record.iteration))

    for _ in range(2):
        torch.manual_seed(0)  # a frozen parameter is not in a checkpoint
        koi = learner(seed=0)
        try:
            koi.train(Regressions(), callbacks=[first, second], checkpoint_dir=folder, resume=True)
        except Exception:
            seen, victim = [], None
    return seen
