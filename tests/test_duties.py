"""What a stopped training owes its last record is done first where it goes on."""

import logging
import math

import pytest
import torch

from koi import CheckpointError, Koi
from log_toys import lines
from resume_toys import Lines, Stateful, reseed
from toys import Regressions, assert_same, small_net

SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": 5, "meta_step_size": 0.5}


class Stop(Exception):  # noqa: N818
    pass


def learner(**settings):
    reseed(1)
    return Koi(small_net(), **SETTINGS | {"seed": 0} | settings)


class Diary:
    """Callbacks that note what they were called for; one of them is stopped once."""

    def __init__(self, stopped="", at=None, error=Stop):
        self.seen, self.stopped, self.at, self.error = [], stopped, at, error

    def callbacks(self, names="abc"):
        return [self.callback(name) for name in names]

    def callback(self, name):
        def call(koi, record):
            if (name, record.iteration) == (self.stopped, self.at):
                self.at = None
                raise self.error
            self.seen.append(f"{name}{record.iteration}")

        return call


@pytest.mark.parametrize("same", [True, False], ids=["in the process", "from a checkpoint"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize(("stopped", "at"), [("a", 0), ("b", 2), ("c", 4)])
def test_each_record_is_seen_by_each_callback_in_order(stopped, at, error, same, tmp_path):
    whole, diary = Diary(), Diary(stopped, at, error)
    learner().train(Lines(), callbacks=whole.callbacks())
    koi = learner()
    with pytest.raises(error):
        koi.train(Lines(), callbacks=diary.callbacks(), checkpoint_dir=tmp_path)
    if same:
        koi.train(Lines(), callbacks=diary.callbacks())
    else:
        koi = learner()
        koi.train(Lines(), callbacks=diary.callbacks(), checkpoint_dir=tmp_path, resume=True)
    assert diary.seen == whole.seen == [f"{name}{i}" for i in range(5) for name in "abc"]
    koi.train(Lines(), callbacks=diary.callbacks())
    assert diary.seen == whole.seen, "owed once"


class Average:
    """Its state has changed by the time that it is stopped, and so has all that it can reach."""

    def __init__(self, stops=None):
        self.stops = stops
        self.state = {"sum": torch.tensor(0.0), "count": 0}

    def optimizer(self, params):
        self.meta = torch.optim.Adam(params, lr=0.1)
        return self.meta

    def __call__(self, koi, record):
        self.state["sum"] += koi.evaluate(self.tasks, 2).after
        koi.step_size *= 0.9
        self.meta.param_groups[0]["lr"] *= 0.8
        if self.stops == record.iteration:
            self.stops = None
            raise KeyboardInterrupt
        self.state["count"] += 1

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("form", ["object", "method"])
@pytest.mark.parametrize("same", [True, False], ids=["in the process", "from a checkpoint"])
def test_what_was_changed_is_put_back(same, form, tmp_path):
    """Without a seed: it evaluates, on the tasks of the training, which keep count."""
    ends = []
    for stops in (None, 2):
        callback, tasks = Average(stops), Stateful()
        folder = {"checkpoint_dir": tmp_path / str(stops)}
        make = lambda callback=callback: learner(  # noqa: E731
            seed=None, meta_optimizer=callback.optimizer, meta_step_size=None
        )
        koi = make()
        given = lambda: callback if form == "object" else callback.__call__  # noqa: B023, E731
        callback.tasks = tasks
        if stops is not None:
            with pytest.raises(KeyboardInterrupt):
                koi.train(tasks, callbacks=[given()], **folder)
            assert callback.state["count"] == 2
            assert koi.step_size == pytest.approx(0.05 * 0.9**2)
            if not same:
                step_size, rate = koi.step_size, callback.meta.param_groups[0]["lr"]
                callback, tasks = Average(), Stateful()
                callback.tasks = tasks
                koi = learner(
                    seed=None,
                    meta_optimizer=callback.optimizer,
                    meta_step_size=None,
                    step_size=step_size,
                )
                reseed(99)
                koi.train(tasks, callbacks=[given()], **folder, resume=True)
                assert rate == pytest.approx(0.1 * 0.8**2)
        if koi.iteration < 5:
            koi.train(tasks, callbacks=[given()])
        ends.append((koi, callback.state, tasks.state, callback.meta.param_groups[0]["lr"]))
    (whole, state, drawn, rate), (koi, *others) = ends
    assert_same(koi.model, whole.model)
    assert others == [state, drawn, rate]


def test_state_that_cannot_be_put_back_is_said(tmp_path):
    class Stubborn(Average):
        tasks = Lines()

        def __call__(self, koi, record):
            raise Stop

        def load_state_dict(self, state):
            raise ValueError("no way back")

    with pytest.raises(Stop) as caught:
        learner().train(Lines(), callbacks=[Stubborn()])
    told = getattr(caught.value, "__notes__", ["no way back"])  # Python 3.10 has no notes
    assert "no way back" in told[0]


def test_stopped_again_it_owes_what_is_left(tmp_path):
    folder = {"checkpoint_dir": tmp_path, "resume": True}
    diary = Diary("b", 2)
    with pytest.raises(Stop):
        learner().train(Lines(), callbacks=diary.callbacks(), **folder)
    diary.stopped, diary.at = "c", 2
    with pytest.raises(Stop):
        learner().train(Lines(), callbacks=diary.callbacks(), **folder)
    assert diary.seen[-2:] == ["a2", "b2"]
    learner().train(Lines(), callbacks=diary.callbacks(), **folder)
    assert diary.seen == [f"{name}{i}" for i in range(5) for name in "abc"]
    learner().train(Lines(), callbacks=diary.callbacks(), **folder)
    assert diary.seen[-1] == "c4", "a training that is done owes nothing"


def test_an_end_that_was_wanted_is_not_forgotten(tmp_path):
    diary = Diary("b", 2)
    ends = lambda koi, record: koi.STOP if record.iteration == 2 else None  # noqa: E731
    callbacks = [ends, *diary.callbacks("ab")]
    with pytest.raises(Stop):
        learner().train(Lines(), callbacks=callbacks, checkpoint_dir=tmp_path)
    koi = learner()
    koi.train(Lines(), callbacks=callbacks, checkpoint_dir=tmp_path, resume=True)
    assert koi.iteration == 3
    assert diary.seen[-2:] == ["a2", "b2"]


@pytest.mark.parametrize(("here", "seen"), [("b", []), ("abcd", ["b2", "c2", "d2"])])
def test_another_number_of_callbacks(here, seen, tmp_path, caplog):
    diary = Diary("b", 2)
    with pytest.raises(Stop):
        learner().train(Lines(), callbacks=diary.callbacks(), checkpoint_dir=tmp_path)
    del diary.seen[:]
    koi = learner()
    with caplog.at_level(logging.WARNING, "koi"):
        koi.train(Lines(), callbacks=diary.callbacks(here), checkpoint_dir=tmp_path, resume=True)
    assert f"stopped in callback 2 of 3 and goes on with {len(here)}" in caplog.text
    assert [text for text in diary.seen if text.endswith("2")] == seen


def test_steps_of_ones_own_owe_nothing():
    diary = Diary("a", 1)
    koi = learner()
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=diary.callbacks("a"))
    koi.step(Lines())
    koi.train(Lines(), callbacks=diary.callbacks("a"))
    assert diary.seen == ["a0", "a3", "a4"]


def test_saved_in_a_callback_it_counts_as_done(tmp_path):
    diary = Diary()
    save = lambda koi, record: koi.save(tmp_path / f"{record.iteration}")  # noqa: E731
    koi = learner()
    koi.train(Lines(), callbacks=[*diary.callbacks("a"), save, *diary.callbacks("b")])
    other = Koi.load(tmp_path / "2", small_net())
    del diary.seen[:]
    other.train(Lines(), callbacks=[*diary.callbacks("a"), save, *diary.callbacks("b")])
    assert diary.seen == ["b2", "a3", "b3", "a4", "b4"]
    assert_same(other.model, koi.model)


def test_lines_that_a_callback_writes(tmp_path):
    """Of [1, 3, 4] none is lost, nor is one there twice."""
    from koi.training.logs import append

    stops = [3, 4]

    def validate(koi, record):
        if record.iteration % 2 == 1 or record.iteration == 4:
            if record.iteration in stops:
                stops.remove(record.iteration)
                raise KeyboardInterrupt
            append(tmp_path / "validation.jsonl", {"iteration": record.iteration})

    folder = {"checkpoint_dir": tmp_path / "saved", "resume": True}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learner().train(Lines(), callbacks=[validate], **folder)
    learner().train(Lines(), callbacks=[validate], **folder)
    assert [line["iteration"] for line in lines(tmp_path, "validation.jsonl")] == [1, 3, 4]


class TestValidation:
    OPTIONS = {"validate_every": 2, "patience": 2}  # noqa: RUF012

    def train(self, folder, validate, tasks=None, **more):
        koi = learner(seed=None, **more)
        options = {"checkpoint_dir": folder, "resume": True, "validate": validate}
        koi.train(tasks or Stateful(), **options, **self.OPTIONS)
        return koi

    @pytest.mark.parametrize("at", [2, 4, 5])
    def test_interrupted_in_any_it_ends_as_without(self, at, tmp_path):
        """It draws from the global generators, on which the training depends."""

        def validate(koi, stops=None):
            value = koi.evaluate(Lines(), 2).after
            if koi.iteration == stops:
                raise KeyboardInterrupt
            return value

        whole = self.train(tmp_path / "whole", validate)
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "cut", lambda koi: validate(koi, at))
        reseed(99)
        koi = self.train(tmp_path / "cut", validate)
        assert_same(koi.model, whole.model)
        assert [r.validation for r in koi.history] == [r.validation for r in whole.history]
        assert koi.best == whole.best
        again = self.train(tmp_path / "cut", lambda koi: pytest.fail("measured twice"))
        assert again.best == whole.best

    def test_nan_is_counted_once(self, tmp_path):
        """As one that was measured, where the training goes on right after it."""
        values = iter([1.0, math.nan])
        koi = self.train(tmp_path, lambda koi: next(values), num_iterations=4)
        assert koi.best.misses == 1
        again = self.train(tmp_path, lambda koi: pytest.fail("measured twice"), num_iterations=4)
        assert again.best == koi.best

    def test_best_that_cannot_be_written_is_measured_again(self, tmp_path, monkeypatch):
        """A full disk: no miss is counted for it."""
        from koi.training import checkpoint

        save = checkpoint.save

        def full(koi, state, path, *more):
            if path.name.startswith("best"):
                raise CheckpointError("full")
            save(koi, state, path, *more)

        koi = learner()
        options = {"validate": lambda koi: 1.0, "checkpoint_dir": tmp_path, **self.OPTIONS}
        monkeypatch.setattr(checkpoint, "save", full)
        with pytest.raises(CheckpointError, match="full"):
            koi.train(Regressions(), **options)
        assert (koi.iteration, koi.best, koi.history[-1].validation) == (2, None, None)
        monkeypatch.setattr(checkpoint, "save", save)
        koi.train(Regressions(), **options)
        assert (koi.best.iteration, koi.best.misses) == (2, 2)
        assert (tmp_path / "best.safetensors").exists()
