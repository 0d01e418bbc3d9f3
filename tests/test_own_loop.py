"""A loop of one's own, and a training that ends before its time: `koi.step`, `koi.STOP`."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import koi as package
from koi import STOP, CheckpointError, ConfigurationError, Koi, NonFiniteError
from koi.problems import Sines
from resume_toys import SETTINGS, Lines, Stateful
from toys import InTurn, Point, Quadratic, Regressions, assert_same, small_net, snapshot


def learner(seed=0, **settings):
    torch.manual_seed(3)
    return Koi(small_net(), seed=seed, **{**SETTINGS, **settings})


def without_seconds(history):
    return [replace(record, seconds=0.0, validation=None) for record in history]


class Stop:
    """A callback that ends the training after so many meta-iterations in all."""

    def __init__(self, after):
        self.after = after

    def __call__(self, koi, record):
        return STOP if koi.iteration == self.after else None


@pytest.mark.parametrize("seed", [0, None])
def test_steps_are_a_training(seed):
    """φ, moments, tasks and ε are those of `train`, from the same random state."""
    tasks = Lines() if seed == 0 else Regressions()
    alone, stepped = (learner(seed, inner_optimizer="adam") for _ in range(2))
    torch.manual_seed(2)
    alone.train(tasks)
    torch.manual_seed(2)
    for _ in range(7):
        stepped.step(tasks)
    assert_same(stepped.model, alone.model)
    assert without_seconds(stepped.history) == without_seconds(alone.history)


def test_steps_and_trainings_in_turn():
    alone, mixed, tasks = learner(), learner(), Lines()
    alone.train(Lines())
    assert mixed.step(tasks).iteration == 0
    mixed.train(tasks, callbacks=[Stop(3)])
    other = learner()
    other.load_state_dict(mixed.state_dict())
    while other.iteration < 7:
        other.step(tasks)
    assert_same(other.model, alone.model)


def test_step_resumes_the_state_of_tasks(tmp_path):
    alone, stepped = learner(), learner()
    alone.train(Stateful())
    tasks = Stateful()
    for _ in range(3):
        stepped.step(tasks)
    stepped.save(tmp_path / "koi.safetensors")
    other = Koi.load(tmp_path / "koi.safetensors", small_net())
    tasks = Stateful()
    for _ in range(4):
        other.step(tasks)
    assert_same(other.model, alone.model)


def test_step_after_the_last():
    koi = learner(num_iterations=1)
    tasks = Lines()
    koi.step(tasks)
    with pytest.raises(ConfigurationError, match="all num_iterations = 1 are done"):
        koi.step(tasks)
    koi.num_iterations = 2
    assert koi.step(tasks).meta_step_size == 0.5


def test_step_inside_a_training():
    koi = learner()
    with pytest.raises(CheckpointError, match=r"koi\.step was called while koi\.train runs"):
        koi.train(Lines(), callbacks=[lambda koi, record: koi.step(Lines())])
    assert koi.iteration == 1
    with pytest.raises(CheckpointError, match=r"koi\.train was called while koi\.train runs"):
        koi.train(Lines(), callbacks=[lambda koi, record: koi.train(Lines())])
    koi.step(Lines())


def test_step_that_fails_leaves_phi():
    koi = Koi(Point(1.0), 0.1, 2, 4, meta_step_size=0.5)
    good, bad = InTurn(Quadratic(0.0)), InTurn(Quadratic(float("nan")))
    koi.step(good)
    before = snapshot(koi.model)
    with pytest.raises(NonFiniteError):
        koi.step(bad)
    assert_same(koi.model, before)
    assert koi.iteration == 1 == len(koi.history)


def test_copies_step_on_their_own():
    koi, tasks = learner(), Lines()
    koi.step(tasks)
    others = copy.deepcopy(koi), pickle.loads(pickle.dumps(koi))
    koi.step(tasks)
    for other in others:
        other.step(tasks)
        assert_same(other.model, koi.model)


def test_stop_ends_as_if_no_iterations_were_left(tmp_path):
    called = []
    koi = learner()
    koi.train(
        Stateful(),
        callbacks=[Stop(3), lambda koi, record: called.append(record.iteration)],
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path,
    )
    assert koi.iteration == 3
    assert called == [0, 1, 2], "the callbacks behind it are still called"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    alone, other = learner(), learner()
    alone.train(Stateful())
    options = {"checkpoint_dir": tmp_path / "checkpoints", "log_dir": tmp_path, "resume": True}
    other.train(Stateful(), **options)
    assert_same(other.model, alone.model)
    assert without_seconds(other.history) == without_seconds(alone.history)


def test_stop_has_three_names():
    assert STOP is package.STOP is Koi.STOP is pickle.loads(pickle.dumps(STOP))
    assert repr(STOP) == "koi.STOP"


def test_records_say_the_norm_of_the_meta_gradient():
    """One task, its centre at 0: after two steps of 0.1, φ − φ̃ is 0.19 φ."""
    koi = Koi(Point(3.0, 4.0), 0.1, 2, 1, meta_step_size=0.5)
    record = koi.step(InTurn(Quadratic(torch.zeros(2))))
    assert record.meta_gradient_norm == pytest.approx(0.19 * 5)
    assert record.update_norm == pytest.approx(0.5 * 0.19 * 5)


@pytest.mark.parametrize("validation", [True, False])
def test_sines_keep_their_engine(validation):
    koi = Koi(torch.nn.Linear(1, 1), 0.01, 2, 4, meta_batch_size=8, seed=0)
    koi.train(Sines(), validate=Sines() if validation else None, validate_every=2)
    assert koi.engine == "vectorized"
