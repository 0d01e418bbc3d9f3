"""Tasks with ``adapt(model, num_steps)`` in the place of ``loss``: an inner loop of their own."""

import logging
import math
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn

import koi
from koi import ConfigurationError, EngineError, Koi, NonFiniteError, TaskError
from toys import InTurn, Point, Quadratic, Regressions, assert_same, snapshot

SETTINGS = {"num_steps": 3, "num_iterations": 4, "meta_step_size": 0.5, "meta_batch_size": 3}


@dataclass
class ByItself:
    """Does what Koi's own inner loop does, by hand."""

    task: object
    step_size: float = 0.1
    called: list = field(default_factory=list)

    def adapt(self, model, num_steps):
        self.called.append(num_steps)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(num_steps):
            optimizer.zero_grad()
            self.task.loss(model).backward()
            optimizer.step()

    @property
    def query(self):
        return self.task


class AllByThemselves(Regressions):
    def __init__(self, wrap=ByItself):
        super().__init__()
        self.wrap = wrap

    def sample(self):
        return self.wrap(super().sample())


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def own(adapt, **more):
    """Return a distribution of one task that adapts so."""
    return InTurn(
        type("Task", (), {"adapt": lambda _, model, steps: adapt(model, steps), **more})()
    )


@pytest.mark.usefixtures("float64")
class TestAsKoisOwn:
    """The same optimizer and loss, in an inner loop of Koi's and in one of the task's own."""

    def test_training(self):
        """φ and buffers to rounding; also with weights, and with a meta-optimizer."""
        start = net()
        for more in ({}, {"meta_optimizer": partial(torch.optim.Adam, lr=0.01)}):
            pair = []
            for tasks in (Regressions(), AllByThemselves()):
                learner = Koi(deepcopy(start), step_size=0.1, seed=0, **SETTINGS | more)
                learner.train(tasks)
                pair.append(learner)
            assert pair[1].engine == "eager"
            models = [snapshot(learner.model) for learner in pair]
            torch.testing.assert_close(*models, rtol=0, atol=1e-12)
            for one, other in zip(*(learner.history for learner in pair), strict=True):
                assert math.isnan(other.loss_before)
                assert one.meta_gradient_norm == pytest.approx(other.meta_gradient_norm)

    def test_evaluate_adapt_and_measure(self):
        """Evaluation begins anew for each number of steps."""
        learner, found = Koi(net(), 0.1, 3, seed=0), []
        for tasks in (Regressions(), AllByThemselves()):
            torch.manual_seed(0)
            parts = [learner.evaluate(tasks, 2).losses]
            parts.append(learner.measure(tasks, lambda model, _: model[0].weight, 2))
            parts.append(learner.adapt(tasks.sample())[3].bias)
            found.append(parts)
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
        task = ByItself(Quadratic([1.0]))
        Koi(Point(0.0)).evaluate(InTurn(task), 1, num_steps=3)
        assert task.called == [1, 2, 3]

    def test_learns_and_frozen_weights(self):
        """What is frozen stays; what is adapted and not learned starts every task as it is."""
        start, pair = net(), []
        start[0].bias.requires_grad_(False)
        for tasks in (Regressions(), AllByThemselves()):
            learner = Koi(deepcopy(start), 0.1, seed=0, learns="3.*", **SETTINGS)
            learner.train(tasks)
            pair.append(snapshot(learner.model))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
        assert torch.equal(pair[1]["0.weight"], start[0].weight)


def test_lbfgs_solves_quadratics():
    """φ goes to the mean of the centres, whatever the curvature: by hand."""

    class Solved(Quadratic):
        def adapt(self, model, num_steps):
            optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

            def closure():
                optimizer.zero_grad()
                loss = self.loss(model)
                loss.backward()
                return loss

            optimizer.step(closure)

    tasks = InTurn(Solved([1.0, 0.0], 1.0), Solved([3.0, 2.0], 4.0))
    learner = Koi(Point(5.0, -5.0), num_steps=2, num_iterations=1, meta_step_size=1.0)
    learner.meta_batch_size = 2
    learner.train(tasks)
    torch.testing.assert_close(learner.model.weight.detach(), torch.tensor([2.0, 1.0]))


class Noisy(ByItself):
    """Draws as it goes."""

    def adapt(self, model, num_steps):
        super().adapt(model, num_steps)
        with torch.no_grad():
            for param in model.parameters():
                param += 0.1 * torch.randn_like(param)


def test_resumed_bit_for_bit(tmp_path):
    """Draws inside are a function of the seed and the place."""
    tasks, settings = AllByThemselves(Noisy), {"seed": 3, **SETTINGS}
    whole = Koi(net(), **settings)
    start = deepcopy(whole.model)
    whole.train(tasks)
    part = Koi(deepcopy(start), **settings)
    stop = lambda koi, record: koi.STOP if koi.iteration == 2 else None  # noqa: E731
    part.train(tasks, callbacks=[stop], checkpoint_dir=tmp_path)
    rest = Koi(net(), **settings)
    rest.train(tasks, checkpoint_dir=tmp_path, resume=True)
    assert rest.iteration == 4
    assert_same(rest.model, whole.model)
    assert [r.update_norm for r in rest.history] == [r.update_norm for r in whole.history]


def test_moments_of_other_tasks_stay():
    """Between two trainings by Adam's steps, tasks that adapt by themselves leave its moments."""
    learner = Koi(net(), inner_optimizer="adam", **SETTINGS)
    learner.train(Regressions())
    before = learner.state_dict()["moments"]
    learner.num_iterations = 6
    learner.train(AllByThemselves())
    torch.testing.assert_close(learner.state_dict()["moments"], before)
    learner.num_iterations = 8
    learner.train(Regressions())


def test_nothing_is_left_from_one_task_to_the_next():
    """Gradients, frozen parameters, modes, hooks and attributes are one task's own."""
    seen = []

    def adapt(model, num_steps):
        first = model[0]
        kept = hasattr(model, "note"), first.weight.requires_grad, model.training
        seen.append((first.weight.grad is None, len(first._forward_hooks), *kept))
        model(torch.ones(2, 3)).sum().backward()
        first.weight.requires_grad_(False)
        first.register_forward_hook(lambda *_: None)
        model.note = "was here"
        model.eval()

    learner = Koi(net(), **SETTINGS)
    learner.train(own(adapt))
    assert seen == [(True, 0, False, True, True)] * 12
    assert all(p.grad is None and p.requires_grad for p in learner.model.parameters())


def test_an_error_leaves_phi(caplog):
    learner = Koi(net(), seed=0, **SETTINGS)
    before = snapshot(learner.model)
    calls = []

    def breaks(model, num_steps):
        calls.append(num_steps)
        with torch.no_grad():
            model[0].weight.fill_(math.nan if len(calls) == 2 else 1.0)
        if len(calls) == 4:
            raise ValueError("no luck")

    with pytest.raises(NonFiniteError, match="not finite at meta-iteration 0, task 1: φ is as"):
        learner.train(own(breaks))
    assert_same(learner.model, before)
    calls[:] = [0, 0]
    with pytest.raises(ValueError, match="no luck"):
        learner.train(own(breaks))
    assert_same(learner.model, before)
    learner.on_nonfinite, calls[:] = "skip", []
    learner.num_iterations = 1
    learner.train(own(lambda *arguments: breaks(*arguments) if len(calls) < 3 else None))
    assert learner.history[0].num_skipped == 1


def test_the_log_says_what_has_no_part(caplog):
    with caplog.at_level(logging.INFO, logger="koi"):
        Koi(net(), **SETTINGS).train(AllByThemselves())
    lines = [line for line in caplog.messages if "adapt by themselves" in line]
    assert lines == [
        "tasks of ByItself adapt by themselves: inner_optimizer and step_size have no part in it"
    ]


class TestRefused:
    @pytest.mark.parametrize("algorithm", ["fomaml", "maml", "eigen-reptile"])
    def test_algorithms_that_look_inside(self, algorithm):
        learner = Koi(net(), algorithm=algorithm, **SETTINGS)
        with pytest.raises(ConfigurationError, match=f"'{algorithm}' needs .*use algorithm='rep"):
            learner.train(AllByThemselves())
        assert learner.iteration == 0

    @pytest.mark.parametrize("engine", [{"vectorize": True}, {"compile": True}])
    def test_engines_that_look_inside(self, engine):
        (name,) = engine
        with pytest.raises(EngineError, match=f"one task after the other, and {name}=True was"):
            Koi(net(), **engine, **SETTINGS).train(AllByThemselves())

    @pytest.mark.parametrize(
        "setting",
        [
            {"clip_inner": 1.0},
            {"adapts": "3.*", "learns": "3.*"},
            {"inner_schedule": koi.linear(1.0, 0.0)},
            {"step_size": {"*": 0.1}},
            {"autocast": torch.bfloat16},
        ],
        ids=str,
    )
    def test_settings_that_reach_inside(self, setting):
        learner = Koi(net(), **setting, **SETTINGS)
        with pytest.raises(ConfigurationError, match=r"cannot reach into the inner loop of ByIt"):
            learner.train(AllByThemselves())
        with pytest.raises(ConfigurationError, match=r"cannot reach into the inner loop of ByIt"):
            learner.adapt(AllByThemselves().sample())

    def test_another_module(self):
        with pytest.raises(TaskError, match="returned another module: it must train the one"):
            Koi(net(), **SETTINGS).train(own(lambda model, _: deepcopy(model)))

    def test_another_parameter(self):
        def adapt(model, num_steps):
            model[3] = nn.Linear(4, 2)

        with pytest.raises(TaskError, match=r"adapt of Task replaced the parameter '3.weight'"):
            Koi(net(), **SETTINGS).train(own(adapt))

    def test_nothing_to_measure(self):
        learner = Koi(net(), **SETTINGS)
        with pytest.raises(TaskError, match="there is nothing to measure of Task, which has adapt"):
            learner.evaluate(own(lambda model, _: None))

    def test_neither_loss_nor_adapt(self):
        with pytest.raises(TaskError, match=r"must have one, or adapt\(model, num_steps\)"):
            Koi(net(), **SETTINGS).train(InTurn(object()))

    def test_both_kinds_in_one_meta_batch(self):
        tasks = InTurn(Regressions().sample(), AllByThemselves().sample())
        with pytest.raises(TaskError, match="one meta-batch holds tasks with an inner loop of"):
            Koi(net(), **SETTINGS).train(tasks)
