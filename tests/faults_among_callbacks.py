"""Ctrl-C at any line of the callbacks, of the validation, and of what calls them; see faults.py."""

import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import koi.training.duties
import koi.training.validation
from koi import Koi
from koi.training.logs import append
from resume_toys import Stateful, reseed
from toys import small_net, snapshot

_draw = random.SystemRandom()
_PLACES = {__file__, koi.training.duties.__file__, koi.training.validation.__file__}


class Evaluates:
    """Evaluates on the tasks of the training, remembers the sum, and writes lines."""

    def __init__(self, tasks, path: Path) -> None:
        self.tasks, self.path = tasks, path
        self.state = {"sum": 0.0, "count": 0}

    def __call__(self, koi, record):
        self.state["count"] += 1
        loss = koi.evaluate(self.tasks, 2).after
        append(self.path, {"iteration": record.iteration, "loss": loss})
        self.state["sum"] += loss

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def train(folder: Path, line: int | None = None) -> tuple[int, list]:
    """Train without a seed and press Ctrl-C at the given line of those that are looked at.

    Returns how many lines there were, and all that has come of the training.
    """
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in _PLACES:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    def validate(koi):
        return koi.evaluate(tasks, 2).after

    tasks = Stateful()
    callbacks = [Evaluates(tasks, folder / f"{number}.jsonl") for number in range(2)]
    learner = Koi(small_net(), 0.05, 2, 3, meta_step_size=0.5, vectorize=False)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        learner.train(
            tasks,
            callbacks=callbacks,
            checkpoint_dir=folder,
            resume=True,
            validate=validate,
            validate_every=2,
        )
    finally:
        sys.settrace(before)
    best = learner.best.iteration, learner.best.value, learner.best.misses
    written = [[json.loads(text) for text in c.path.read_text().splitlines()] for c in callbacks]
    found = [best, tasks.state["count"], [callback.state for callback in callbacks], written]
    return lines, [*found, *(tensor.tolist() for tensor in snapshot(learner.model).values())]


def among_callbacks(times: int) -> int:
    """Ctrl-C at a random line; the training goes on as if it had not come."""
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "whole"
        folder.mkdir()
        reseed(1)
        lines, whole = train(folder)
        for number in range(times):
            folder = Path(name) / str(number)
            folder.mkdir()
            reseed(1)
            try:
                train(folder, _draw.randint(1, lines))
                lost += 1  # it was swallowed
            except KeyboardInterrupt:
                reseed(99 if list(folder.glob("iteration-*")) else 1)
                lost += train(folder)[1] != whole
    return lost
