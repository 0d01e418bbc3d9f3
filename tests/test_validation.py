"""`train(validate=…)`: what is measured, the best φ, patience, and going on from a checkpoint."""

import json
import math

import pytest
import torch

from koi import ConfigurationError, Koi
from resume_toys import Lines, Stateful
from test_own_loop import Stop, learner, without_seconds
from toys import Point, Quadratic, assert_same, snapshot


def far_off(values):
    """Return a callable that gives these values in turn, by the meta-iterations done."""
    return lambda koi: values[koi.iteration - 1]


def falling(koi):
    return 1 / koi.iteration


def test_with_a_seed_the_training_is_undisturbed():
    alone, watched = learner(), learner()
    alone.train(Lines())
    watched.train(Lines(), validate=Lines(), validate_every=2, keep_best=False)
    assert_same(watched.model, alone.model)


def test_when_and_what_is_measured():
    koi = learner()
    koi.train(Lines(), validate=Lines(), validate_every=3, keep_best=False)
    values = [record.validation for record in koi.history]
    assert [value is not None for value in values] == [False, False, True] * 2 + [True]
    assert values[-1] == koi.evaluate(Lines(), num_tasks=100).after, "the same tasks"


def test_no_seed_is_not_disturbed():
    """Without a seed tasks draw from the global generators, which validation leaves alone."""

    class Around:
        def sample(self):
            return Quadratic(torch.randn(2))

    ends = []
    for options in ({}, {"validate": Around(), "validate_every": 1, "keep_best": False}):
        koi = Koi(Point(1.0, 2.0), 0.1, 2, 5)
        torch.manual_seed(7)
        koi.train(Around(), **options)
        ends.append(snapshot(koi.model)["weight"])
    assert torch.equal(*ends)
    twice = Koi(Point(1.0, 2.0), 0.1, 2, 2, meta_step_size=0.0)
    twice.train(Around(), validate=Around(), validate_every=1)
    first, second = (record.validation for record in twice.history)
    assert first == second, "the same tasks at the same φ"


def test_best_is_what_the_caller_gets(tmp_path):
    values, phis = [3.0, 1.0, 2.0, math.nan, 1.0, 2.0, 4.0], []

    def note(koi, record):
        phis.append(snapshot(koi.model))

    koi = learner(inner_optimizer="adam")
    koi.train(
        Lines(),
        callbacks=[note],
        validate=far_off(values),
        validate_every=1,
        checkpoint_dir=tmp_path,
    )
    assert (koi.best.iteration, koi.best.value, koi.best.misses) == (2, 1.0, 5)
    assert_same(koi.model, phis[1])
    best = Koi.load(tmp_path / "best.safetensors", learner().model)
    assert best.iteration == 2
    assert_same(best.model, phis[1])
    last = Koi.load(tmp_path / "iteration-000000007.safetensors", learner().model)
    assert_same(last.model, phis[-1])
    # it evaluates with the moments of the best, too
    assert koi.evaluate(Lines(), 3).mean == best.evaluate(Lines(), 3).mean


def test_keep_best_false_leaves_the_last():
    koi, alone = learner(), learner()
    alone.train(Lines())
    koi.train(Lines(), validate=lambda koi: koi.iteration, validate_every=1, keep_best=False)
    assert koi.best.iteration == 1
    assert_same(koi.model, alone.model)


def test_patience():
    koi = learner(num_iterations=20)
    koi.train(Lines(), validate=lambda koi: abs(koi.iteration - 6), validate_every=2, patience=3)
    assert koi.iteration == 12
    assert koi.best.iteration == 6
    koi.train(Lines(), validate=falling, validate_every=2, patience=3)
    assert koi.iteration == 12, "patience has run out"
    koi.train(Lines(), validate=falling, validate_every=2, patience=4)
    assert koi.iteration > 12


@pytest.mark.parametrize("kill", [1, 2, 3, 4, 5, 6])
def test_resumed_bit_for_bit(kill, tmp_path):
    """Killed after any meta-iteration: measurements, best φ and patience are as without."""
    options = {"validate": Lines(), "validate_every": 2, "patience": 2}
    alone = learner(inner_optimizer="adam")
    alone.train(Stateful(), **options, checkpoint_dir=tmp_path / "alone")
    folder = tmp_path / "killed"
    for callbacks in ([Stop(kill)], []):
        koi = learner(inner_optimizer="adam")
        koi.train(Stateful(), None, callbacks, folder, resume=True, **options)
    assert without_seconds(koi.history) == without_seconds(alone.history)
    assert [r.validation for r in koi.history] == [r.validation for r in alone.history]
    assert koi.best == alone.best
    assert_same(koi.model, alone.model)


def test_validation_that_is_interrupted_is_owed(tmp_path):
    """Ctrl-C inside of it: the resumed training measures first what was due."""
    seen = []

    def interrupted(koi):
        seen.append(koi.iteration)
        if seen == [2]:
            raise KeyboardInterrupt
        return 1.0

    for number in range(2):
        koi = learner()
        options = {"checkpoint_dir": tmp_path, "resume": True}
        if number == 0:
            with pytest.raises(KeyboardInterrupt):
                koi.train(Lines(), validate=interrupted, validate_every=2, **options)
        else:
            koi.train(Lines(), validate=interrupted, validate_every=2, **options)
    assert seen == [2, 2, 4, 6, 7]
    assert koi.history[1].validation == 1.0


def test_in_the_log(tmp_path):
    koi = learner()
    koi.train(Lines(), validate=falling, validate_every=3, log_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation"] for line in lines] == [None, None, 1 / 3, None, None, 1 / 6, 1 / 7]
    assert koi.history[2].validation == 1 / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validate_every": 0}, "validate_every = 0"),
        ({"patience": 3}, "patience was given without validate"),
        ({"validate": falling, "patience": 0}, "patience = 0"),
        ({"validate": falling, "keep_best": 1}, "keep_best = 1"),
        ({"validate": 5}, "validate = 5"),
        ({"validate": lambda koi: "low", "validate_every": 1}, "validate returned 'low'"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        learner().train(Lines(), **options)
