"""What `train` tells and returns."""

import io
import logging
import re
import sys

import pytest

from koi import Koi, Record, linear
from toys import InTurn, Point, Quadratic, Regressions, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.1, "num_steps": 3, "num_iterations": 4, "meta_step_size": 0.25}


def test_returns_the_users_model():
    model = small_net()
    koi = Koi(model, **SETTINGS)
    assert koi.model is model
    assert koi.train(Regressions()) is model


def test_calling_the_learner_calls_the_model():
    class Model(Point):
        def forward(self, x, scale=1):
            return scale * self.weight * x

    assert Koi(Model(2.0))(3.0, scale=5).item() == 30


def test_no_iterations():
    model = small_net()
    before = snapshot(model)
    koi = Koi(model, num_iterations=0)
    assert koi.train(Regressions()) is model
    assert koi.history == []
    assert_same(model, before)


def test_nothing_is_left_after_training():
    model = small_net()
    koi = Koi(model, **SETTINGS)
    koi.train(Regressions())
    after = snapshot(model)
    called = []
    koi.train(Regressions(), callbacks=[lambda *_: called.append(1)])
    assert_same(model, after)
    assert called == []
    assert len(koi.history) == 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_history(algorithm):
    """On w² with w − c = 2 at first: each step takes w − c times 0.8."""
    koi = Koi(Point(3.0), **SETTINGS | {"num_iterations": 2}, algorithm=algorithm)
    koi.train(InTurn(Quadratic(1.0, curvature=2.0)))
    factor = {
        "reptile": 1 - 0.25 * (1 - 0.8**3),
        "fomaml": 1 - 0.25 * 2 * 0.8**3,
        "maml": 1 - 0.25 * 2 * 0.8**6,
    }[algorithm]
    # the last loss that was computed: at the third step before its update, or the query loss
    steps = 2 if algorithm == "reptile" else 3
    for number, record in enumerate(koi.history):
        distance = 2 * factor**number
        assert isinstance(record, Record)
        assert record.iteration == number
        assert record.loss_before == pytest.approx(distance**2)
        assert record.loss_after == pytest.approx((distance * 0.8**steps) ** 2)
        assert record.meta_step_size == 0.25
        assert record.update_norm == pytest.approx(distance * (1 - factor))
        assert 0 < record.seconds < 60
        assert record.num_skipped == 0


@pytest.mark.usefixtures("float64")
def test_history_has_means_over_the_tasks():
    koi = Koi(Point(0.0, 0.0), 0.5, 2, 1, meta_step_size=1.0, meta_batch_size=2)
    koi.train(InTurn(Quadratic([4.0, 0.0]), Quadratic([0.0, 2.0])))
    (record,) = koi.history
    assert record.loss_before == pytest.approx((8 + 2) / 2)
    assert record.loss_after == pytest.approx((8 + 2) / 2 / 4)
    assert record.update_norm == pytest.approx(0.75 * (2**2 + 1**2) ** 0.5)


def test_update_norm_with_a_meta_optimizer():
    import torch

    koi = Koi(Point(3.0, -4.0), meta_optimizer=lambda p: torch.optim.SGD(p, lr=2.0), num_steps=2)
    koi.num_iterations = 1
    koi.train(InTurn(Quadratic([0.0, 0.0])))
    expected = 2 * 5 * (1 - 0.99**2)
    assert koi.history[0].update_norm == pytest.approx(expected, rel=1e-4)


def test_callbacks_see_the_learner_after_each_meta_iteration():
    calls = []

    def first(koi, record):
        calls.append(("first", koi, record, koi.model.weight.item()))

    def second(koi, record):
        calls.append(("second", koi, record, koi.model.weight.item()))

    koi = Koi(Point(1.0), **SETTINGS)
    koi.train(InTurn(Quadratic(0.0)), callbacks=[first, second])
    assert [name for name, *_ in calls] == ["first", "second"] * 4
    assert all(who is koi for _, who, _, _ in calls)
    assert [record for _, _, record, _ in calls[::2]] == koi.history
    values = [value for *_, value in calls[::2]]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_callbacks_may_be_any_iterable():
    calls = []
    callback = lambda koi, record: calls.append(record.iteration)  # noqa: E731
    Koi(Point(1.0), **SETTINGS).train(InTurn(Quadratic(0.0)), callbacks=(c for c in [callback]))
    assert calls == [0, 1, 2, 3]


def test_callback_may_ask_for_more_iterations():
    def extend(koi, record):
        if record.iteration == 2:
            koi.num_iterations = 6

    koi = Koi(Point(1.0), **SETTINGS)
    koi.train(InTurn(Quadratic(0.0)), callbacks=[extend])
    assert len(koi.history) == 6


class TestProgressBar:
    def train(self, progress):
        koi = Koi(Point(3.0), 0.1, 3, 4, meta_step_size=linear(1.0, 0.0))
        koi.train(InTurn(Quadratic(1.0)), progress=progress)
        return koi

    @pytest.mark.parametrize("progress", [None, False])
    def test_quiet_where_there_is_no_terminal(self, progress, capfd):
        self.train(progress)
        assert capfd.readouterr() == ("", "")

    def test_shown_when_asked_for(self, capfd):
        koi = self.train(True)
        out, err = capfd.readouterr()
        assert out == ""
        last = koi.history[-1]
        assert "4/4" in err
        assert f"loss {last.loss_before:.3g} → {last.loss_after:.3g}, ε 0.25" in err

    @pytest.mark.parametrize(("progress", "shown"), [(None, True), (True, True), (False, False)])
    def test_on_a_terminal(self, progress, shown, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        self.train(progress)
        assert bool(terminal.getvalue()) == shown

    @pytest.mark.parametrize("progress", [True, False])
    def test_messages_above_the_bar(self, progress, capfd, monkeypatch):
        """A compiler takes a minute, in which a bar that stands still says nothing."""
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
        log = logging.getLogger("koi")
        before = log.level, list(log.handlers)
        koi = Koi(Point(3.0), **SETTINGS)
        koi.train(
            InTurn(Quadratic(1.0)),
            progress=progress,
            callbacks=[lambda koi, record: log.info("compiling %s", record.iteration)],
        )
        assert ("compiling 3\n" in capfd.readouterr().err) == progress
        assert (log.level, log.handlers) == before

    def test_messages_are_left_to_the_programs_own_handlers(self, capfd, caplog):
        caplog.set_level(logging.INFO, "koi")
        koi = Koi(Point(3.0), **SETTINGS)
        log = logging.getLogger("koi")
        koi.train(
            InTurn(Quadratic(1.0)), progress=True, callbacks=[lambda *_: log.info("compiling")]
        )
        assert "compiling" not in capfd.readouterr().err
        assert caplog.messages == ["compiling"] * 4

    def test_goes_on_where_training_goes_on(self, capfd):
        def stop(koi, record):
            if record.iteration == 1:
                raise KeyboardInterrupt

        koi = Koi(Point(3.0), **SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            koi.train(InTurn(Quadratic(1.0)), callbacks=[stop])
        koi.train(InTurn(Quadratic(1.0)), progress=True)
        counts = re.findall(r"(\d)/4", capfd.readouterr().err)
        assert counts[0] == "2"
        assert counts[-1] == "4"
