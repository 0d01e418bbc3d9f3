"""Whatever a public callable is given: it works, or says in words of Koi's what is wrong."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from koi import ConfigurationError, Koi, SupervisedTask, cosine, linear
from koi.fewshot import Episodes, LabelledData, labelled
from koi.problems import Lines, Sines
from public_calls import CALLS, DOORS, PLACES, WRONG, elsewhere, of_a_task, raw

# What is called by Koi alone, or is no more than a form.
NOT_CALLED = {"Task", "TaskDistribution", "SupervisedTask.loss", "Adaptation", "Algorithm", "given"}
NOT_CALLED |= {"AgainstGradient", "TowardsPoint", "schedule_of", "Task.loss"}
NOT_CALLED |= {"RaggedTask.loss", "SupervisedTask.criterion", "TaskDistribution.sample"}
NOT_CALLED |= {"LabelledData.take_known"}


def public():
    """Yield the name of each public function, class and method."""
    for door in DOORS:
        for name in getattr(door, "__all__", [n for n in vars(door) if not n.startswith("_")]):
            value = getattr(door, name)
            own = getattr(value, "__module__", "").startswith("koi.")
            own &= hasattr(door, "__all__") or getattr(value, "__module__", "") == door.__name__
            if not (own and callable(value)) or value.__module__.startswith("koi.algorithms."):
                continue
            short = f"{door.__name__.rpartition('.')[2]}.{name}"
            yield short if short in CALLS else name
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                takes = inspect.isfunction(function) and len(inspect.signature(function).parameters)
                if not method.startswith("_") and takes > 1:
                    yield f"{name}.{method}"


def test_all_of_them_are_here():
    names = {name for name in public() if name not in NOT_CALLED}
    errors = {name for name in names if name.endswith(("Error", "Warning"))}
    assert names - errors - set(CALLS) == set()


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_work(name):
    """So that what the others show is about the wrong one."""
    call = CALLS[name]
    if "imagenet.load" in name or name.startswith("omniglot."):
        pytest.skip("its data are not there; test_omniglot.py and test_mini_imagenet.py have some")
    with elsewhere():
        call.function(**call.arguments())


@settings(
    max_examples=200,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(PLACES), st.integers(0, len(WRONG) - 1))
def test_wrong_arguments(place, number):
    """`make faults` tries ten thousand."""
    with elsewhere():
        assert raw(place, WRONG[number]) is None


def koi(**settings):
    return Koi(nn.Linear(1, 1), num_steps=2, num_iterations=2, **settings)


def task(**changed):
    return lambda: SupervisedTask(**{**of_a_task(), **changed})


x = torch.ones(3, 1)
REFUSED = {
    "a number as callback": lambda: koi().train(Lines(), callbacks=[5]),
    "adapt to nothing": lambda: koi().adapt(None),
    "adapt to many": lambda: koi().adapt(Lines()),
    "no metric": lambda: koi().measure(Lines(), None),
    "folder 5": lambda: koi().train(Lines(), checkpoint_dir=5),
    "folder without a name": lambda: koi().train(Lines(), checkpoint_dir=""),
    "log without a name": lambda: koi().train(Lines(), log_dir=""),
    "resume as a word": lambda: koi().train(Lines(), checkpoint_dir="x", resume="false"),
    "progress as a word": lambda: koi().train(Lines(), progress="yes"),
    "progress as a number": lambda: koi().train(Lines(), progress=0),
    "compile without a name": lambda: koi(compile=""),
    "compile in no mode": lambda: koi(compile="x"),
    "load nothing": lambda: Koi.load(None, nn.Linear(1, 1)),
    "device 5": lambda: Episodes(labelled((x, [0, 1, 1])), 2, 1, device=5),
    "labels that are none": lambda: labelled((x, None)),
    "batches of none": task(batch_size=0),
    "negative batches": task(batch_size=-1),
    "lengths that differ": task(support_targets=x),
    "lengths of queries that differ": task(query_targets=x),
    "an empty set": task(support_inputs=x[:0], support_targets=x[:0]),
    "an empty query set": task(query_inputs=x[:0], query_targets=x[:0]),
    "no tensor": task(support_inputs=[1.0]),
    "a key of another type": task(key=torch.tensor(1.0)),
    "no criterion": task(criterion=None),
    "class of a criterion": task(criterion=nn.MSELoss),
    "waves in batches of none": lambda: Sines(batch_size=0),
    "waves of none": lambda: Sines(num_points=0),
    "lines of none": lambda: Lines(num_points=0),
    "a schedule of words": lambda: linear("a", "b"),
    "a schedule of NaN": lambda: cosine(float("nan"), 0.0),
    "a rate that is too large": lambda: koi(step_size=1e308),
    "too many steps": lambda: koi(**{}).adapt(Lines().sample(), num_steps=10**30),
    "steps without end": lambda: Koi(nn.Linear(1, 1), num_steps=10**30),
    "no optimizer": lambda: koi(meta_optimizer=lambda params: None),
    "labels of two kinds": lambda: LabelledData(x, ["a", "b"], [1, "2"]),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r": must|it must|must return"):
        call()
    assert list(tmp_path.iterdir()) == []


def test_no_callbacks_and_one():
    seen = []
    koi().train(Lines(), callbacks=None)
    koi().train(Lines(), callbacks=lambda koi, record: seen.append(record.iteration))
    assert seen == [0, 1]


def test_before_the_first_meta_iteration():
    learner = koi()
    with pytest.raises(ConfigurationError, match="callbacks = 5"):
        learner.train(Lines(), callbacks=[5])
    assert learner.iteration == 0
