"""Threads that share the graphs of single tasks change nothing but the time."""

import threading
import time
from copy import deepcopy

import pytest
import torch
from torch import nn

from engine_toys import ALGORITHMS, Fits, assert_agree, conv, everything, mlp, trained
from koi import NonFiniteError
from koi.inner.compiled.workers import Call, Workers, threads
from koi.randomness import Place
from test_engines_chunks import Failures

pytestmark = pytest.mark.usefixtures("float64", "traced", "two_threads")
PLACE = Place(0, "meta-iteration", 0)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


@pytest.fixture
def shares(monkeypatch):
    """The names of the threads that call graphs."""
    names, real = [], Call.__call__

    def noted(call):
        names.append(threading.current_thread().name)
        return real(call)

    monkeypatch.setattr(Call, "__call__", noted)
    return names


# MAML's graph takes as long to trace as those of all others.
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(a, marks=[pytest.mark.slow] * (a == "maml")) for a in ALGORITHMS],
)
def test_same_as_eager(algorithm, shares):
    tasks, settings = Fits((1, 4, 4)), {"meta_batch_size": 5, "algorithm": algorithm}
    model = conv()
    eager = trained("eager", model, tasks, **settings, num_iterations=3)
    shared = trained("compiled", model, tasks, **settings, num_iterations=3)
    assert_agree(shared, eager)
    assert {name.startswith("koi") for name in shares} == {True, False}  # one compiles here
    curves = [learner.evaluate(tasks, 7).losses for learner in (shared, eager)]
    torch.testing.assert_close(*curves, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("untraced")
def test_without_a_compiler_nothing_is_shared(shares):
    trained("compiled", mlp(), Fits(), meta_batch_size=3, num_iterations=3)
    assert not any(name.startswith("koi") for name in shares)


def test_chunk_size_bounds_how_many_run_at_once(shares):
    trained("compiled", mlp(), Fits(), meta_batch_size=3, chunk_size=1, num_iterations=3)
    assert not any(name.startswith("koi") for name in shares)


def test_random_losses_are_drawn_in_order(shares):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    settings = {"meta_batch_size": 4, "seed": 0, "num_iterations": 3}
    learners = [trained("compiled", model, Fits(), **settings) for _ in range(2)]
    torch.testing.assert_close(*map(everything, learners), rtol=0, atol=0)
    assert not any(name.startswith("koi") for name in shares)


def test_failing_task_is_named():
    with pytest.raises(NonFiniteError, match="task 2, inner step 1"):
        trained("compiled", mlp(), Failures(6), meta_batch_size=4, num_iterations=3)


def test_number_of_threads():
    seen = []

    def look():
        seen.append(torch.get_num_threads())

    trained("compiled", mlp(), Fits(), meta_batch_size=3, num_iterations=2)
    look()
    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert seen == [2, 2]


class Work:
    """Stands in for a program."""

    threadsafe = True

    def __init__(self):
        self.running, self.done = 0, []

    def run(self, number):
        self.running += 1
        time.sleep(0.01 if number % 2 else 0.03)
        self.running -= 1
        if number == 4:
            raise ValueError("four")
        self.done.append(number)
        return number


def calls(work, numbers):
    return [Call(PLACE, n, 1, work, (n,), shared=True, num_threads=1) for n in numbers]


def test_order():
    found = [result for _, result in Workers(2).run(calls(Work(), range(4)))]
    assert found == [0, 1, 2, 3]


def test_error_leaves_nothing_running():
    work, workers = Work(), Workers(2)
    with pytest.raises(ValueError, match="four") as error:
        list(workers.run(calls(work, range(12))))
    assert "task 4; φ is as it was before" in "".join(error.value.__notes__)
    assert work.running == 0
    assert len(work.done) < 9
    assert [n for _, n in workers.run(calls(work, [0, 1]))] == [0, 1]


def test_a_caller_that_stops_leaves_nothing_running():
    work = Work()
    results = Workers(2).run(calls(work, range(3)))
    next(results)
    results.close()
    assert work.running == 0


def test_copy_has_threads_of_its_own():
    workers = Workers(2)
    copied = deepcopy({"here": workers})["here"]
    assert copied._pool is not workers._pool
    assert [n for _, n in copied.run(calls(Work(), [0, 1, 2]))] == [0, 1, 2]


def test_after_a_fork():
    workers = Workers(2)
    workers._process, workers._pool = -1, None  # as a child process finds them
    assert [n for _, n in workers.run(calls(Work(), [0, 1, 2]))] == [0, 1, 2]
