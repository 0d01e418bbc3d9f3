"""Workers that draw ahead: the same training as without, and none of them is left behind."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from engine_toys import Fit
from koi import ConfigurationError, Koi, TaskError, stack
from koi.tasks import TaskBatch
from koi.training.ahead import packed
from rank_runs import Counted, Noises, Own
from toys import Begun, Regression, Regressions, assert_same, small_net, snapshot

# from Python 3.12 on; what torch's DataLoader does everywhere
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    # where there is one core
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

SETTINGS = {"num_steps": 2, "meta_batch_size": 3, "inner_optimizer": "adam", "seed": 0}


class Together:
    """Tasks that are drawn together."""

    def sample_batch(self, num_tasks):
        return Fit(torch.randn(num_tasks, 6, 3), torch.randn(num_tasks, 6, 2))


class Levels(Regressions):
    """Tasks that a callback makes harder."""

    def __init__(self):
        super().__init__()
        self.levels = [1.0]

    def sample(self):
        task = super().sample()
        task.targets = task.targets * sum(self.levels)
        return task


def trained(tasks, num_iterations=6, koi=None, settings=(), **options):
    workers = Begun()
    torch.manual_seed(0)
    koi = koi or Koi(small_net(), 0.05, num_iterations=num_iterations, **SETTINGS | dict(settings))
    koi.train(tasks, **options)
    assert workers() == []
    return koi


@pytest.mark.parametrize("kind", [Regressions, Together, Noises])
def test_same_training_as_without(kind):
    plain = trained(kind())
    before = torch.get_rng_state()
    ahead = trained(kind(), workers=2)
    assert_same(ahead.model, plain.model)
    assert [vars(a) | {"seconds": 0} for a in ahead.history] == [
        vars(b) | {"seconds": 0} for b in plain.history
    ]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, None])
def test_resumed_exactly(seed, tmp_path):
    """Stopped in the midst, with draws ahead that are thrown away; and drawn a seed of its own."""
    settings, folder = {"seed": seed}, {"checkpoint_dir": tmp_path, "resume": True}
    stop = lambda koi, record: koi.STOP if koi.iteration == 3 else None  # noqa: E731
    trained(Regressions(), settings=settings, workers=2, callbacks=[stop], **folder)
    whole = trained(Regressions(), settings=settings, workers=2)
    resumed = trained(Regressions(), settings=settings, workers=1, **folder)
    assert resumed.iteration == 6
    assert_same(resumed.model, whole.model)


def test_what_a_callback_changes():
    def callback(koi, record):
        if record.iteration == 1:
            koi.meta_batch_size = 2
        if record.iteration == 2:
            tasks.levels.append(2.0)
        if record.iteration == 3:
            koi.seed = 5

    found = []
    for workers in (0, 2):
        tasks = Levels()
        found.append(trained(tasks, callbacks=[callback], workers=workers).model)
    assert_same(*found)


class Nest(Regressions):
    """Multiplies by what lies deep in it, or far down in a list, or in an array of NumPy's."""

    def __init__(self, kind):
        super().__init__()
        levels = {"list": [1.0] * 300, "dict": dict.fromkeys(range(300), 1.0), "array": np.ones(3)}
        self.kept = {"a": [{"b": [{"c": levels[kind]}]}]}

    @property
    def levels(self):
        return self.kept["a"][0]["b"][0]["c"]

    def sample(self):
        task = super().sample()
        task.inputs = task.inputs * self.levels[0]
        return task


@pytest.mark.parametrize("kind", ["list", "dict", "array"])
def test_what_a_callback_changes_in_place(kind):
    """Workers went on with what it had been, without a word."""

    def callback(koi, record):
        if record.iteration == 1:
            tasks.levels[0] = 2.0

    found = []
    for workers in (0, 1):
        tasks = Nest(kind)
        found.append(trained(tasks, callbacks=[callback], workers=workers).model)
    assert_same(*found)


class Dying(Regressions):
    """Lets the worker that draws one meta-iteration meet with something, once."""

    def __init__(self, happens):
        super().__init__()
        self.happens, self.seed = happens, None

    def sample(self):
        if get_worker_info() is not None and torch.initial_seed() == self.seed:
            self.happens()
        return super().sample()


def seed_of_the_fourth():
    """Return what the generator is set to for the first task of meta-iteration 3."""
    seeds = []

    class Seen(Regressions):
        def sample(self):
            seeds.append(torch.initial_seed())
            return super().sample()

    trained(Seen())
    return seeds[9]


def fail():
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("happens", "kind", "text"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), TaskError, "was killed by signal 9"),
        (lambda: os._exit(3), TaskError, "ended with code 3"),
        (fail, ValueError, "no luck"),
    ],
    ids=["killed", "ended", "raises"],
)
def test_worker_that_meets_with_trouble(happens, kind, text):
    tasks = Dying(happens)
    whole = trained(tasks)
    tasks.seed = seed_of_the_fourth()
    koi, phi = Koi(small_net(), 0.05, num_iterations=6, **SETTINGS), {}
    koi.model.load_state_dict(trained(tasks, num_iterations=0).model.state_dict())
    look = lambda koi, record: phi.update(snapshot(koi.model))  # noqa: E731
    workers = Begun()
    with pytest.raises(kind, match=text):
        koi.train(tasks, workers=2, callbacks=[look])
    assert workers() == []
    # a worker's death may come before what it had drawn is used
    assert koi.iteration == 3 if kind is ValueError else koi.iteration <= 3
    if phi:
        assert_same(koi.model, phi)
    assert_same(trained(tasks, koi=koi).model, whole.model)


def test_ctrl_c_leaves_none_behind():
    """It goes to all processes of a terminal: the workers leave it to the training."""
    pids, workers = [], Begun()

    def callback(koi, record):
        pids.extend(process.pid for process in workers())
        if record.iteration == 2:
            for pid in [*pids, os.getpid()]:
                os.kill(pid, signal.SIGINT)

    koi = Koi(small_net(), 0.05, num_iterations=6, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        koi.train(Regressions(), workers=2, callbacks=[callback])
    assert len(set(pids)) == 2
    assert workers() == []
    assert koi.iteration == 3


class Learners(Regressions):
    """Refers to the learner."""


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        (Counted(), "keeps something from draw to draw"),
        (Own(), "draws from what the seed does not set"),
        (Learners(), "refers to the learner"),
    ],
)
def test_draws_that_depend_on_more_are_refused(tasks, why):
    koi = Koi(small_net(), **SETTINGS)
    if isinstance(tasks, Learners):
        tasks.level = lambda: koi.iteration
    with pytest.raises(ConfigurationError, match=f"workers = 2 cannot draw .* ahead, which {why}"):
        koi.train(tasks, workers=2)
    with pytest.raises(ConfigurationError, match="workers = -1"):
        koi.train(tasks, workers=-1)


def test_tasks_that_cannot_be_sent():
    class Local(Regression):
        pass

    class Locals(Regressions):
        def sample(self):
            return Local(torch.randn(6, 3), torch.randn(6, 2))

    with pytest.raises(TaskError, match="a task Local cannot be sent from the worker"):
        trained(Locals(), workers=1)


def test_of_a_view_no_more_is_sent():
    data = torch.randn(100_000, 3)
    batch = TaskBatch(stacked=stack([Fit(rows[:6], rows[:6, :2]) for rows in data.split(50_000)]))
    lists = TaskBatch(tasks=[Regression(data[:6], data[:6, :2]) for _ in itertools.repeat(0, 2)])
    assert max(len(packed(batch)), len(packed(lists))) < 5000
