"""Ctrl-C at any moment: φ moves wholly or not at all."""

import os
import signal
import threading

import pytest
import torch

from koi import Koi
from koi.phi import arithmetic
from toys import InTurn, Point, Quadratic, Regression, assert_same, small_net

SETTINGS = {"step_size": 0.5, "num_steps": 2, "meta_step_size": 0.5}


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_during_a_loss():
    class Task(Quadratic):
        calls = 0

        def loss(self, model):
            self.calls += 1
            if self.calls == 4:
                press_ctrl_c()
            return super().loss(model)

    model = Point(1.0)
    koi = Koi(model, num_iterations=3, **SETTINGS)
    task = Task(0.0)
    with pytest.raises(KeyboardInterrupt):
        koi.train(InTurn(task))
    assert koi.iteration == len(koi.history) == 1
    assert model.weight.item() == 1 - 0.5 * 0.75
    koi.train(InTurn(task))
    assert model.weight.item() == (1 - 0.5 * 0.75) ** 3


@pytest.mark.parametrize("moment", ["before φ moves", "after φ moved"])
def test_during_the_meta_update(moment, monkeypatch):
    """It is held back until φ, the history and the count agree."""
    whole, model = small_net(), small_net()
    model.load_state_dict(whole.state_dict())
    task = Regression(torch.randn(6, 3), torch.randn(6, 2))
    Koi(whole, num_iterations=1, **SETTINGS).train(InTurn(task))

    real = arithmetic.interpolate_

    def interrupted(*arguments):
        if moment == "before φ moves":
            press_ctrl_c()
        real(*arguments)
        if moment == "after φ moved":
            press_ctrl_c()

    monkeypatch.setattr(arithmetic, "interpolate_", interrupted)
    koi = Koi(model, num_iterations=3, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        koi.train(InTurn(task))
    assert_same(model, whole)
    assert koi.iteration == len(koi.history) == 1


def test_handler_of_the_user_is_called_and_stays():
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        handler = signal.getsignal(signal.SIGINT)
        press = lambda koi, record: press_ctrl_c()  # noqa: E731
        koi = Koi(Point(1.0), num_iterations=3, **SETTINGS)
        koi.train(InTurn(Quadratic(0.0)), callbacks=[press])
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT] * 3
    assert koi.iteration == 3


def test_training_in_a_thread():
    """Only the main thread may set a signal's handler; elsewhere Koi does without."""
    model, errors = Point(1.0), []

    def work():
        try:
            Koi(model, num_iterations=1, **SETTINGS).train(InTurn(Quadratic(0.0)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert model.weight.item() == 1 - 0.5 * 0.75
