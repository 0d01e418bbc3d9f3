"""A training that was stopped and goes on ends, bit for bit, where it would have ended."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from koi import (
    CheckpointError,
    ConfigurationError,
    Koi,
    KoiWarning,
    NonFiniteError,
    linear,
    tensor_task,
)
from toys import InTurn, Point, Quadratic, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": 7, "meta_batch_size": 2}


@tensor_task
@dataclass
class Line:
    inputs: torch.Tensor
    targets: torch.Tensor

    def loss(self, model):
        noise = torch.randn_like(self.inputs)
        return F.mse_loss(model(self.inputs + 0.1 * noise), self.targets)


class Lines:
    """Draws from all three global generators."""

    def sample(self):
        level = random.random() + np.random.rand()
        return Line(torch.randn(4, 3), level * torch.randn(4, 2))


class Stateful(Lines):
    """Counts on its own, and what it gives depends on the count."""

    def __init__(self):
        self.state = {"count": 0, "scale": torch.tensor(1.0)}

    def sample(self):
        self.state["count"] += 1
        self.state["scale"] *= 1.01
        task = super().sample()
        return replace(task, targets=task.targets * self.state["scale"] + self.state["count"])

    def state_dict(self):
        return self.state  # an alias, as torch's own state_dict gives

    def load_state_dict(self, state):
        self.state = state


def net():
    """A module with buffers of both kinds, dropout and a frozen parameter."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)
    )
    model[1].bias.requires_grad_(False)
    return model


def velocity(params, lr):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def by_torch(params, lr):
    return torch.optim.RMSprop(params, lr=lr, momentum=0.5)


def meta_adam(params):
    return torch.optim.Adam(params, lr=0.05)


CASES = {
    "sgd": {},
    "sgd with momentum": {"inner_optimizer": velocity},
    "adam": {"inner_optimizer": "adam", "meta_step_size": linear(1.0, 0.0)},
    "adam reset": {"inner_optimizer": "adam", "inner_state": "reset"},
    "an optimizer without a rule": {"inner_optimizer": by_torch},
    "meta adam": {"meta_optimizer": meta_adam},
    "a schedule of the user's": {"meta_step_size": lambda fraction: 0.5 - fraction / 4},
    "fomaml": {"algorithm": "fomaml", "inner_optimizer": "adam"},
    "maml": {"algorithm": "maml", "inner_optimizer": "adam", "meta_optimizer": meta_adam},
    "unseeded": {"seed": None, "inner_optimizer": "adam"},
    "bfloat16": {"autocast": torch.bfloat16},
    "float16": {"autocast": torch.float16},
    "in chunks": {"chunk_size": 1},
}


class Stop(Exception):  # noqa: N818
    """What stops a training in these tests."""


class StopsInside(Stateful):
    """Raises while the fourth meta-batch is drawn, after some of its draws."""

    error = Stop

    def sample(self):
        if self.state["count"] == 2 * 3 + 1:
            raise self.error
        return super().sample()


def stops_after(iteration, error=Stop):
    def callback(koi, record):
        if record.iteration + 1 == iteration:
            raise error

    return callback


def learner(model, case, vectorize):
    return Koi(model, **{**SETTINGS, "seed": 0, "vectorize": vectorize, **case})


def reseed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def uninterrupted(case, vectorize):
    reseed(1)
    koi = learner(net(), case, vectorize)
    koi.train(Stateful())
    return koi


def assert_same_training(koi, whole):
    assert_same(koi.model, whole.model)
    assert koi.iteration == whole.iteration
    assert koi.engine == whole.engine
    known = [[replace(record, seconds=0) for record in k.history] for k in (koi, whole)]
    assert known[0] == known[1]
    here, there = koi.state_dict(), whole.state_dict()
    assert all(map(torch.equal, here["moments"] or [], there["moments"] or []))
    assert here["scale"] == there["scale"]


@pytest.mark.parametrize("vectorize", [False, True], ids=["one by one", "at once"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resumed_run_equals_the_uninterrupted_one(case, vectorize, tmp_path):
    """Stopped in the middle of a meta-iteration; and, on the way there, between two of them."""
    if vectorize and case.get("autocast") is torch.float16:
        pytest.skip("float16 runs one task at a time")
    whole = uninterrupted(case, vectorize)

    reseed(1)
    koi = learner(net(), case, vectorize)
    folder = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Stop):
        koi.train(Stateful(), callbacks=[stops_after(1)], **folder)
    reseed(2)
    koi = learner(net(), case, vectorize)
    with pytest.raises(Stop):
        koi.train(StopsInside(), **folder, resume=True)
    assert koi.iteration == 3
    reseed(3)
    koi = learner(net(), case, vectorize)
    koi.train(Stateful(), **folder, resume=True)
    assert_same_training(koi, whole)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iteration-000000006.safetensors", "iteration-000000007.safetensors"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_saved_and_loaded_by_hand(case, tmp_path):
    whole = uninterrupted(case, False)
    reseed(1)
    koi = learner(net(), case, False)
    with pytest.raises(Stop):
        koi.train(Stateful(), callbacks=[stops_after(4)])
    koi.save(tmp_path / "koi")
    reseed(2)
    code = {name: value for name, value in case.items() if callable(value)}
    koi = Koi.load(tmp_path / "koi", net(), **code)
    koi.save(tmp_path / "again")  # nothing is lost on the way
    koi = Koi.load(tmp_path / "again", net(), **code)
    koi.train(Stateful())
    assert_same_training(koi, whole)


def assert_compiled_resumes(vectorize, tmp_path):
    case = {"compile": True, "inner_optimizer": "adam", "num_iterations": 4}
    whole = uninterrupted(case, vectorize)
    reseed(1)
    with pytest.raises(Stop):
        learner(net(), case, vectorize).train(
            Stateful(), callbacks=[stops_after(2)], checkpoint_dir=tmp_path
        )
    koi = learner(net(), case, vectorize)
    koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("vectorize", [False, True])
def test_compiled_engines(vectorize, tmp_path):
    assert_compiled_resumes(vectorize, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [False, True])
def test_compiled(vectorize, tmp_path):
    assert_compiled_resumes(vectorize, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, TypeError])
def test_any_error_saves(error, tmp_path):
    tasks, constant = StopsInside(), {"meta_step_size": 0.05}
    tasks.error = error
    koi = learner(small_net(), constant, False)
    with pytest.raises(error):
        koi.train(tasks, checkpoint_dir=tmp_path)
    after = snapshot(koi.model)
    koi = learner(small_net(), constant | {"num_iterations": 3}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same(koi.model, after)
    assert koi.iteration == 3


def test_error_before_the_first_update_saves_nothing(tmp_path):
    tasks = StopsInside()
    tasks.state["count"] = 7
    with pytest.raises(Stop):
        learner(small_net(), {}, False).train(tasks, checkpoint_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_saves_what_was_before(tmp_path):
    koi = learner(Point(1.0), {"num_iterations": 5, "meta_batch_size": 1}, False)
    tasks = InTurn(Quadratic(0.0), Quadratic(0.0), Quadratic(float("nan")))
    with pytest.raises(NonFiniteError, match="iteration 2"):
        koi.train(tasks, checkpoint_dir=tmp_path)
    loaded = Koi.load(tmp_path / "iteration-000000002.safetensors", Point(0.0))
    assert_same(loaded.model, koi.model)
    assert loaded.history == koi.history


def test_skipped_tasks(tmp_path):
    case = {"on_nonfinite": "skip", "num_iterations": 4}
    tasks = [Quadratic(1.0), Quadratic(float("nan"))]
    whole = learner(Point(3.0), case, False)
    whole.train(InTurn(*tasks))
    with pytest.raises(Stop):
        learner(Point(3.0), case, False).train(
            InTurn(*tasks), callbacks=[stops_after(2)], checkpoint_dir=tmp_path
        )
    koi = learner(Point(0.0), case, False)
    koi.train(InTurn(*tasks), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


def test_optimizers_that_callbacks_change(tmp_path):
    """A meta-optimizer's learning rate, as a scheduler changes it, goes on where it was."""

    made = []

    def make(params):
        made.append(meta_adam(params))
        return made[-1]

    def slower(koi, record):
        made[-1].param_groups[0]["lr"] *= 0.5

    case = {"meta_optimizer": make}
    reseed(1)
    whole = learner(net(), case, False)
    whole.train(Stateful(), callbacks=[slower])
    reseed(1)
    with pytest.raises(Stop):
        learner(net(), case, False).train(
            Stateful(), callbacks=[slower, stops_after(3)], checkpoint_dir=tmp_path
        )
    koi = learner(net(), case, False)
    koi.train(Stateful(), callbacks=[slower], checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


def test_moments_keep_their_type(tmp_path):
    """torch's load_state_dict would give them the type of the parameters."""

    class Precise(torch.optim.SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                state = self.state[param]
                state["sum"] = state.get("sum", 0) + param.grad.double() / 3
                param.data -= (0.1 * state["sum"]).to(param.dtype)

    case = {"meta_optimizer": lambda params: Precise(params, lr=0.1)}
    whole = uninterrupted(case, False)
    reseed(1)
    with pytest.raises(Stop):
        learner(net(), case, False).train(
            Stateful(), callbacks=[stops_after(3)], checkpoint_dir=tmp_path
        )
    koi = learner(net(), case, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


def test_nothing_to_resume_starts_from_the_beginning(tmp_path):
    whole = uninterrupted({}, False)
    reseed(1)
    koi = learner(net(), {}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path / "new" / "folder", resume=True)
    assert_same_training(koi, whole)


def test_finished_training_is_not_trained_on(tmp_path):
    koi = learner(net(), {}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    other = learner(net(), {}, False)
    other.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(other, koi)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("constant", [{"meta_step_size": 0.05}, {"algorithm": "fomaml"}])
def test_more_iterations_where_epsilon_is_constant(tmp_path, constant):
    whole = uninterrupted(constant | {"num_iterations": 9}, False)
    reseed(1)
    short = learner(net(), constant | {"num_iterations": 4}, False)
    short.train(Stateful(), checkpoint_dir=tmp_path)
    koi = learner(net(), constant | {"num_iterations": 9}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


def test_no_more_iterations_where_the_default_falls_over_them(tmp_path):
    learner(net(), {"num_iterations": 2}, False).train(Stateful(), checkpoint_dir=tmp_path)
    same = learner(net(), {"num_iterations": 2}, False)
    same.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert same.iteration == 2
    koi = learner(net(), {"num_iterations": 3}, False)
    with pytest.raises(CheckpointError, match="num_iterations: 2 in the checkpoint, 3 here"):
        koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)


def test_damaged_newest_gives_way_to_the_one_before(tmp_path):
    whole = uninterrupted({}, False)
    reseed(1)
    with pytest.raises(Stop):
        learner(net(), {}, False).train(
            Stateful(), callbacks=[stops_after(5)], checkpoint_dir=tmp_path, checkpoint_every=2
        )
    newest = tmp_path / "iteration-000000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    koi = learner(net(), {}, False)
    with pytest.warns(KoiWarning, match=r"000005\.safetensors is damaged"):
        koi.train(Stateful(), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert_same_training(koi, whole)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    (tmp_path / "iteration-000000005.safetensors").write_bytes(b"")
    with (
        pytest.warns(KoiWarning, match="iteration-000000005"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints"),
    ):
        learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path, resume=True)


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "iteration-5.txt").write_text("mine")
    (tmp_path / ".iteration-000000003.safetensors.1.tmp").write_text("of a killed process")
    learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-000000006.safetensors",
        "iteration-000000007.safetensors",
        "iteration-5.txt",
        "notes.txt",
    ]


def test_earlier_training_is_not_overwritten(tmp_path):
    learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path)
    model = net()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="resume=True"):
        learner(model, {}, False).train(Stateful(), checkpoint_dir=tmp_path)
    assert_same(model, before)
    assert len(list(tmp_path.iterdir())) == 1


def test_training_on_in_the_same_process(tmp_path):
    """The learner knows where it is: what it wrote itself is no earlier training."""
    koi = learner(small_net(), {}, False)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(3)], checkpoint_dir=tmp_path)
    koi.train(Lines(), checkpoint_dir=tmp_path)
    assert koi.iteration == 7
    assert len(list(tmp_path.iterdir())) == 2


def test_learner_that_is_ahead_is_not_set_back(tmp_path):
    koi = learner(net(), {}, False)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(2)], checkpoint_dir=tmp_path)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(5)])
    koi.train(Lines(), checkpoint_dir=tmp_path, resume=True)
    assert [record.iteration for record in koi.history] == list(range(7))


@pytest.mark.parametrize(
    "arguments", [{"resume": True}, {"checkpoint_every": 3}, {"checkpoint_every": 0}]
)
def test_arguments_that_make_no_sense(arguments, tmp_path):
    if arguments == {"checkpoint_every": 0}:
        arguments = {"checkpoint_every": 0, "checkpoint_dir": tmp_path}
    with pytest.raises(ConfigurationError, match=r"checkpoint_dir|checkpoint_every = 0"):
        learner(net(), {}, False).train(Lines(), **arguments)


def test_engine_that_was_found_is_not_looked_for_again(tmp_path, monkeypatch):
    case = {"seed": None, "num_iterations": 30}
    koi = learner(small_net(), case, "auto")
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(20)], checkpoint_dir=tmp_path)
    found = koi.engine
    engines = set()
    koi = learner(small_net(), case, "auto")
    koi.train(
        Lines(),
        callbacks=[lambda koi, record: engines.add(koi.engine)],
        checkpoint_dir=tmp_path,
        resume=True,
    )
    assert engines == {found}
