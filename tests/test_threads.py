"""Threads: one learner trains in one at a time, and two learners give what each gives alone."""

import copy
import logging
import pickle
import signal
import threading

import pytest
import torch

from koi import CheckpointError, Koi
from test_interrupts import press_ctrl_c
from test_randomness import Noisy, NoisyTask, dropout_net, states
from toys import InTurn, Point, Quadratic, assert_same, snapshot

SETTINGS = {
    "step_size": 0.01,
    "num_steps": 3,
    "num_iterations": 12,
    "meta_step_size": 0.1,
    "meta_batch_size": 2,
}


def learner(seed, **settings):
    torch.manual_seed(1)
    return Koi(dropout_net(), seed=seed, **SETTINGS | settings)


def in_threads(*works):
    """Run functions at once, each in a thread of its own; return what they raised."""
    raised, start = [], threading.Barrier(len(works))

    def run(work):
        try:
            start.wait()
            work()
        except BaseException as error:
            raised.append(error)

    threads = [
        threading.Thread(target=run, args=(work,), name=f"T{i}") for i, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("vectorize", [False, True], ids=["one by one", "at once"])
def test_two_learners_with_seeds_are_as_alone(vectorize):
    """Beside a third without a seed; in all they do, and the generators stay as they were."""

    def works(koi):
        tasks = Stackable() if vectorize else Noisy()
        koi.train(tasks)
        ends.setdefault(koi.seed, []).append(
            [*snapshot(koi.model).values(), koi.evaluate(tasks, 3).losses]
        )
        assert koi.iteration == SETTINGS["num_iterations"]

    ends = {}
    for seed in (1, 2):
        works(learner(seed, vectorize=vectorize))
    learners = [learner(seed, vectorize=vectorize) for seed in (1, 2)]
    before = states()
    assert in_threads(*(lambda koi=koi: works(koi) for koi in learners)) == []
    assert states() == before
    learners = [learner(seed, vectorize=vectorize) for seed in (1, 2, None)]
    assert in_threads(*(lambda koi=koi: works(koi) for koi in learners)) == []
    for seed in (1, 2):
        alone, *together = ends[seed]
        for other in together:
            assert all(map(torch.equal, other, alone))


class Stackable:
    def sample_batch(self, num_tasks):
        from resume_toys import Line

        return Line(torch.randn(num_tasks, 4, 3), torch.randn(num_tasks, 4, 2))


def test_one_learner_from_two_threads_is_refused():
    entered, finished = threading.Event(), threading.Event()

    def waits(koi, record):
        if record.iteration == 0:
            entered.set()
            finished.wait()

    koi = learner(0)
    thread = threading.Thread(target=koi.train, args=(Noisy(), None, [waits]), name="first")
    thread.start()
    entered.wait()
    words = (
        r"koi\.{} was called in the thread MainThread while koi\.train of the same Koi runs in fir"
    )
    for name in ("train", "step"):
        with pytest.raises(CheckpointError, match=words.format(name)):
            getattr(koi, name)(Noisy())
    with pytest.raises(CheckpointError, match="load_state_dict was called in the thread Main"):
        koi.load_state_dict(koi.state_dict())
    assert koi.evaluate(Noisy(), 2).num_tasks == 2, "between two meta-iterations"
    finished.set()
    thread.join()
    assert koi.iteration == SETTINGS["num_iterations"]
    alone = learner(0)
    alone.train(Noisy())
    assert_same(koi.model, alone.model)


def test_both_at_once_do_not_overshoot():
    """Whichever is second is refused, or begins when the first is done."""
    for _ in range(5):
        koi = learner(0)
        raised = in_threads(lambda: koi.train(Noisy()), lambda: koi.train(Noisy()))  # noqa: B023
        assert [type(error) for error in raised] in ([], [CheckpointError])
        assert koi.iteration == len(koi.history) == SETTINGS["num_iterations"]


def test_evaluating_in_a_thread_waits_for_its_turn():
    """And sees φ as a meta-iteration has left it, never in the midst of one."""
    koi = Koi(Point(1.0), 0.5, 2, 200, meta_step_size=0.01, vectorize=False, seed=0)
    seen, known = [], [1.0]
    note = lambda koi, record: known.append(koi.model.weight.item())  # noqa: E731
    thread = threading.Thread(target=koi.train, args=(InTurn(Quadratic(0.0)), None, [note]))
    thread.start()
    while thread.is_alive():
        seen.append(koi.evaluate(InTurn(Quadratic(0.0)), 1).before)
    assert koi.iteration == 200
    assert len(seen) > 5
    assert set(seen) <= {(torch.tensor(weight).square() / 2).item() for weight in known}


@pytest.mark.parametrize("method", ["train", "step", "load_state_dict"])
def test_nested_in_its_own_callback_is_refused(method):
    """By name; Ctrl-C is afterwards what it was."""

    def nested(koi, record):
        getattr(koi, method)(koi.state_dict() if method == "load_state_dict" else InTurn(task))

    before, task = signal.getsignal(signal.SIGINT), Quadratic(0.0)
    koi = Koi(Point(1.0), num_iterations=3)
    with pytest.raises(CheckpointError, match=rf"{method} was called while koi\.train runs, by a"):
        koi.train(InTurn(task), callbacks=[nested])
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()
    koi.train(InTurn(task))
    assert koi.iteration == 3


def test_another_learner_may_train_in_a_callback():
    """It is no part of the training, which ends as without it."""
    koi, alone = learner(0), learner(0)
    inner = lambda outer, record: learner(1, num_iterations=2).train(Noisy())  # noqa: E731
    koi.train(Noisy(), callbacks=[inner])
    alone.train(Noisy())
    assert_same(koi.model, alone.model)


def test_a_copy_that_a_callback_makes_can_train():
    copies = []

    def keep(koi, record):
        if record.iteration == 5:
            copies.extend([copy.deepcopy(koi), pickle.loads(pickle.dumps(koi))])

    koi = learner(0)
    koi.train(Noisy(), callbacks=[keep])
    for other in copies:
        other.train(Noisy())
        assert_same(other.model, koi.model)


def test_a_seed_in_a_thread_is_said(caplog):
    """What other threads draw from torch itself cannot be kept apart."""
    with caplog.at_level(logging.WARNING, "koi"):
        in_threads(lambda: learner(None).train(Noisy()))
        learner(0).train(Noisy())
        assert caplog.text == ""
        in_threads(lambda: learner(0).train(Noisy()))
    assert "training with a seed in the thread T0" in caplog.text
    assert len(caplog.records) == 1


def test_draws_of_a_callback_in_the_same_thread_are_its_own():
    koi, alone = learner(0), learner(0)
    koi.train(Noisy(), callbacks=[lambda koi, record: torch.rand(100)])
    alone.train(Noisy())
    assert_same(koi.model, alone.model)
    assert koi.adapt(NoisyTask(0.0)) is not koi.model
