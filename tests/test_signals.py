"""A training that SIGTERM ends saves first; one that kill -9 ends goes on all the same."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest

import long_run
from forked import CONTEXT
from koi import Koi, KoiWarning
from resume_toys import assert_same_training, learner
from toys import InTurn, Point, Quadratic, assert_same


class TestSigterm:
    def kill_in_a_loss(self, koi, folder, times=1):
        """Train; the signal comes in the middle of meta-iteration 2."""

        class Task(Quadratic):
            def loss(self, model):
                if koi.iteration == 2:
                    for _ in range(times):
                        os.kill(os.getpid(), signal.SIGTERM)
                return super().loss(model)

        koi.train(InTurn(Task(0.0)), checkpoint_dir=folder)

    @pytest.mark.parametrize("times", [1, 5])
    def test_finishes_the_meta_iteration_and_exits(self, times, tmp_path):
        koi = learner(Point(1.0), {}, False)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            self.kill_in_a_loss(koi, tmp_path, times)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert koi.iteration == 3
        (path,) = tmp_path.iterdir()
        assert_same(Koi.load(path, Point(0.0)).model, koi.model)

    def test_handler_of_the_program_is_called_after_saving(self, tmp_path):
        seen = []

        def handler(number, frame):
            seen.append((number, [path.name for path in tmp_path.glob("*.safetensors")]))

        before = signal.signal(signal.SIGTERM, handler)
        try:
            koi = learner(Point(1.0), {}, False)
            self.kill_in_a_loss(koi, tmp_path)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)
        assert seen[0] == (signal.SIGTERM, ["iteration-000000003.safetensors"])
        assert koi.iteration == 7

    def test_ignored_signal_stays_ignored(self, tmp_path):
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            koi = learner(Point(1.0), {}, False)
            self.kill_in_a_loss(koi, tmp_path)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert koi.iteration == 7

    def test_without_a_folder_the_program_is_left_alone(self):
        seen = []
        handler = lambda number, frame: seen.append(koi.iteration)  # noqa: E731
        before = signal.signal(signal.SIGTERM, handler)
        try:
            koi = learner(Point(1.0), {"meta_batch_size": 1, "num_steps": 1}, False)
            with pytest.warns(KoiWarning, match="num_steps = 1"):
                self.kill_in_a_loss(koi, None)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert seen == [2]

    def test_training_in_a_thread(self, tmp_path):
        koi = learner(Point(1.0), {}, False)
        work = lambda: koi.train(InTurn(Quadratic(0.0)), checkpoint_dir=tmp_path)  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert koi.iteration == 7


def start(folder):
    """Start a training in a process of its own and wait until it has learned something."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=long_run.run, args=(folder, there))
    process.start()
    there.close()
    return process, here, here.recv()


def assert_ended_as_if_never_stopped(folder):
    whole, tasks = long_run.make()
    whole.train(tasks)
    koi, tasks = long_run.make()
    koi.train(tasks, checkpoint_dir=folder, resume=True)
    assert_same_training(koi, whole)
    names = sorted(path.name for path in folder.iterdir())
    assert names[-1] == "iteration-000000200.safetensors"
    assert len(names) <= 2


def test_terminated_process(tmp_path):
    process, pipe, last = start(tmp_path)
    process.terminate()
    pipe.send("go on")
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            last = pipe.recv()
    process.join()
    assert process.exitcode == 143
    assert last < 199
    newest = max(path.name for path in tmp_path.iterdir())
    assert newest == f"iteration-{last + 1:09d}.safetensors"
    assert_ended_as_if_never_stopped(tmp_path)


def test_killed_process(tmp_path):
    """kill -9 at moments that are different in every run of this test."""
    reached = []
    for _ in range(3):
        process, _pipe, first = start(tmp_path)
        reached.append(first)
        time.sleep(random.SystemRandom().uniform(0, 0.25))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert reached == sorted(reached)
    assert reached[1] > 0, "the second process did not go on where the first was killed"
    assert_ended_as_if_never_stopped(tmp_path)
