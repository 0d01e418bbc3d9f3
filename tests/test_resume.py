"""A training that was stopped and goes on ends, bit for bit, where it would have ended."""

import pytest
import torch

from koi import Koi, NonFiniteError
from resume_toys import (
    CASES,
    Lines,
    Stateful,
    Stop,
    StopsInside,
    assert_same_training,
    learner,
    meta_adam,
    net,
    reseed,
    stops_after,
    uninterrupted,
)
from toys import InTurn, Point, Quadratic, assert_same, small_net, snapshot


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
