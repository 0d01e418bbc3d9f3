"""Every argument is checked when the learner is made, all mistakes in one error."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from koi import ConfigurationError, Koi, KoiError, TaskError, linear
from toys import InTurn, Point, Quadratic, Regression, Regressions, assert_same, small_net

NAN, INF = float("nan"), float("inf")

WRONG = {
    "model": [None, "model", nn.Linear, [nn.Linear(1, 1)]],
    "step_size": [0, -0.1, NAN, INF, "0.1", None, True, 1j, [0.1], torch.ones(2), 10**400],
    "num_steps": [0, -1, 2.0, NAN, "3", None, True, [3]],
    "num_iterations": [-1, 10.0, "many", None, False],
    "meta_step_size": [-0.1, NAN, INF, "linear", True, (1.0, 0.0)],
    "meta_batch_size": [0, -4, 2.5, "4", None, True],
    "inner_optimizer": ["sdg", "Adam", 0.1, None, True],
    "inner_state": ["keep", None, True],
    "meta_optimizer": ["adam", 0.1, True],
    "algorithm": ["reptiles", "MAML", None, 1],
    "vectorize": ["yes", None, 1, 0],
    "compile": [None, 1, 0.5],
    "seed": [-1, 0.5, "seed", True],
    "on_nonfinite": ["ignore", None, False],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value(name, value):
    arguments = {"model": nn.Linear(1, 1), name: value}
    with pytest.raises(ConfigurationError, match=rf"^{name} = .*: must be ") as caught:
        Koi(**arguments)
    assert len(caught.value.problems) == 1


def test_all_mistakes_at_once():
    arguments = {name: values[0] for name, values in WRONG.items()}
    with pytest.raises(ConfigurationError) as caught:
        Koi(**arguments)
    named = [problem.split(" = ")[0] for problem in caught.value.problems]
    assert sorted(named) == sorted(WRONG)
    assert str(caught.value).splitlines() == list(caught.value.problems)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("inner_optimizer", "sdg", "sgd"),
        ("inner_optimizer", "adams", "adam"),
        ("algorithm", "reptiles", "reptile"),
        ("algorithm", "fomalm", "fomaml"),
        ("inner_state", "carried", "carry"),
        ("on_nonfinite", "raises", "raise"),
        ("vectorize", "autos", "auto"),
    ],
)
def test_did_you_mean(name, given, meant):
    with pytest.raises(ConfigurationError, match=rf'did you mean "{meant}"\?'):
        Koi(nn.Linear(1, 1), **{name: given})


def test_no_hint_where_nothing_is_near():
    with pytest.raises(ConfigurationError) as caught:
        Koi(nn.Linear(1, 1), algorithm="xyzzy")
    assert "did you mean" not in str(caught.value)
    assert "'reptile', 'fomaml', 'maml'" in str(caught.value)


def test_errors_are_koi_errors_and_value_errors():
    assert issubclass(ConfigurationError, KoiError)
    assert issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 1, "num_iterations": 0},
        {"meta_step_size": 0.0},
        {"meta_step_size": 2},
        {"meta_step_size": linear(1.0, 0.0)},
        {"inner_optimizer": torch.optim.AdamW},
        {"inner_optimizer": lambda params, lr: torch.optim.SGD(params, lr)},
        {"meta_optimizer": torch.optim.Adam},
        {"seed": 0},
        {"seed": 2**63},
    ],
)
def test_right_values(settings):
    Koi(nn.Linear(1, 1), **settings)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
@pytest.mark.parametrize("algorithm", ["reptile", "maml"])
def test_a_name_is_torchs_optimizer_with_its_defaults(algorithm, name, optimizer):
    named, given = small_net(), small_net()
    given.load_state_dict(named.state_dict())
    for model, inner_optimizer in ((named, name), (given, optimizer)):
        koi = Koi(model, 0.1, 3, 2, algorithm=algorithm, inner_optimizer=inner_optimizer, seed=7)
        koi.train(Regressions(split=True))
    assert_same(named, given)


@pytest.mark.parametrize("inner_optimizer", ["sgd", "adam", torch.optim.RMSprop])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_numbers_of_numpy_are_numbers(algorithm, inner_optimizer):
    """And they mean what Python's numbers mean, the seed included."""
    plain, numpy = small_net(), small_net()
    numpy.load_state_dict(plain.state_dict())
    shared = {"inner_optimizer": inner_optimizer, "algorithm": algorithm}
    Koi(plain, 0.125, 3, 4, meta_step_size=0.5, meta_batch_size=2, seed=7, **shared).train(
        Regressions(split=True)
    )
    Koi(
        numpy,
        np.float32(0.125),
        np.int64(3),
        np.int32(4),
        meta_step_size=np.float32(0.5),
        meta_batch_size=np.uint8(2),
        seed=np.int64(7),
        **shared,
    ).train(Regressions(split=True))
    assert_same(numpy, plain)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.RMSprop,
        lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, dampening=0.5),
        lambda params, lr: torch.optim.Adam(params, lr, amsgrad=True),
    ],
)
def test_maml_needs_an_optimizer_to_differentiate_through(optimizer):
    with pytest.raises(ConfigurationError, match=r"algorithm='maml' .* 'fomaml'"):
        Koi(nn.Linear(1, 1), algorithm="maml", inner_optimizer=optimizer)


def test_meta_optimizer_that_is_none():
    with pytest.raises(ConfigurationError, match="meta_optimizer returned str"):
        Koi(nn.Linear(1, 1), meta_optimizer=lambda params: "adam")


class TestCalls:
    """What is given to the methods is checked as well."""

    koi = Koi(Point(0.0), num_iterations=0)

    @pytest.mark.parametrize("tasks", [None, 3, object(), [Quadratic(0.0)]])
    @pytest.mark.parametrize("method", ["train", "evaluate"])
    def test_tasks_that_cannot_be_sampled(self, method, tasks):
        with pytest.raises(ConfigurationError, match=r"tasks = .*: must be .*sample\(\) -> task"):
            getattr(self.koi, method)(tasks)

    @pytest.mark.parametrize("method", ["train", "evaluate"])
    def test_one_task_in_place_of_many(self, method):
        with pytest.raises(ConfigurationError, match="this looks like one task"):
            getattr(self.koi, method)(Regression(None, None))

    @pytest.mark.parametrize("method", ["train", "evaluate"])
    def test_class_in_place_of_an_object(self, method):
        with pytest.raises(ConfigurationError, match=r"its class: give an object, InTurn\(…\)"):
            getattr(self.koi, method)(InTurn)
        with pytest.raises(ConfigurationError, match=r"a class: give an object, Quadratic\(…\)"):
            self.koi.adapt(Quadratic)
        with pytest.raises(TaskError, match=r"returned the class Quadratic: .* Quadratic\(…\)"):
            self.koi.evaluate(InTurn(Quadratic), num_tasks=1)

    def test_class_that_samples_by_itself(self):
        class Always:
            @staticmethod
            def sample():
                return Quadratic(0.0)

        assert self.koi.evaluate(Always, num_tasks=1).after == 0

    @pytest.mark.parametrize("value", [0, -1, 2.5, "ten", True])
    def test_num_tasks(self, value):
        with pytest.raises(ConfigurationError, match=rf"num_tasks = {re.escape(repr(value))}"):
            self.koi.evaluate(InTurn(Quadratic(0.0)), num_tasks=value)

    @pytest.mark.parametrize("value", [-1, 2.5, "ten", True])
    def test_num_steps(self, value):
        tasks = InTurn(Quadratic(0.0))
        with pytest.raises(ConfigurationError, match=rf"num_steps = {re.escape(repr(value))}"):
            self.koi.evaluate(tasks, num_steps=value)
        with pytest.raises(ConfigurationError, match="num_steps"):
            self.koi.adapt(tasks.sample(), num_steps=value)
