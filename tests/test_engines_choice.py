"""vectorize="auto" runs all tasks at once, or one by one where that is faster, and says so."""

import logging

import pytest
import torch
from torch import nn

from engine_toys import Fits, auto, conv, log_lines, mlp, trained
from koi import Koi
from koi.engines import inner_loop
from koi.inner.compiled.workers import threads
from koi.inner.dispatch import why_one_by_one
from koi.settings import Settings
from koi.tasks import TaskBatch, stack

pytestmark = pytest.mark.usefixtures("float64")


def test_one_task_runs_alone(caplog):
    model = mlp()
    learner = auto(model, Fits(), meta_batch_size=1)
    assert learner.engine == "eager"
    assert not log_lines(caplog)
    evaluation = learner.evaluate(Fits(), num_tasks=3)  # these can run at once, and are the same
    eager = trained("eager", model, Fits(), meta_batch_size=1)
    torch.testing.assert_close(evaluation.losses, eager.evaluate(Fits(), 3).losses)


def test_what_can_run_at_once_does(caplog):
    learner = auto(mlp(), Fits())
    assert learner.engine == "vectorized"
    assert not log_lines(caplog)


def wide(width):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def recurrent(dtype):
    return nn.Sequential(nn.LSTM(3, 4, proj_size=2)).to(dtype)


CHOICES = {
    "three tasks of a small network": (mlp(), 3, "reptile", None),
    "two": (mlp(), 2, "reptile", "2 tasks at once take longer"),
    "many parameters": (wide(22_000), 5, "reptile", "with 132,002 parameters each task is work"),
    "a few less": (wide(21_000), 5, "reptile", None),
    "an LSTM": (recurrent(torch.float32), 5, "fomaml", "an LSTM's kernel takes one task at a time"),
    "in float64": (recurrent(torch.float64), 5, "reptile", None),
    "differentiated twice": (recurrent(torch.float32), 5, "maml", None),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_faster_one_by_one_is_known_by_its_size(case):
    model, num_tasks, algorithm, reason = CHOICES[case]
    settings = Settings(algorithm=algorithm, num_iterations=1)
    inner = inner_loop(model, settings, None)
    shapes = TaskBatch(tasks=[Fits().sample()]).shapes
    found = why_one_by_one(model, inner, shapes, num_tasks, compiled=False)
    assert found == reason if reason is None else reason in found
    # compiled, parameters alone count
    by_size = found if case == "many parameters" else None
    assert why_one_by_one(model, inner, shapes, num_tasks, compiled=True) == by_size


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("width", "alone"), [(64, False), (65, True)])
def test_large_images_run_one_by_one(width, alone, compiled):
    inner, tasks = inner_loop(conv(), Settings(), None), [Fits((1, 64, width)).sample()] * 5
    for batch in TaskBatch(tasks=tasks), TaskBatch(stacked=stack(tasks)):
        with threads(2):
            why = why_one_by_one(conv(), inner, batch.shapes, 5, compiled=compiled)
        assert (why is not None) == alone


@pytest.mark.parametrize("num_threads", [1, 2])
def test_compiled_convolutions_run_one_by_one_on_one_thread(num_threads):
    model = conv()
    inner = inner_loop(model, Settings(), None)
    with threads(num_threads):
        why = why_one_by_one(model, inner, [torch.Size((6, 1, 4, 4))], 5, compiled=True)
    assert (why is not None) == (num_threads == 1)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(("num_tasks", "engine"), [(2, "eager"), (3, "vectorized")])
def test_the_choice_is_the_same_each_time_and_said_once(num_tasks, engine, seed, caplog):
    caplog.set_level(logging.INFO, "koi")
    for _ in range(2):
        caplog.clear()
        learner = auto(mlp(), Fits(), seed=seed, num_iterations=5, meta_batch_size=num_tasks)
        assert learner.engine == engine
        (line,) = log_lines(caplog)
        assert f"in the engine {engine}" in line


def test_engine_before_anything_ran():
    assert Koi(mlp()).engine == "none yet"
