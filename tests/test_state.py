"""A learner's state as torch users know it: state_dict() and load_state_dict()."""

import ast
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import koi as package
from koi import CheckpointError, Koi
from resume_toys import (
    CASES,
    Stateful,
    Stop,
    assert_same_training,
    learner,
    net,
    reseed,
    stops_after,
    uninterrupted,
)
from toys import Regressions, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.1, "num_steps": 2, "num_iterations": 4, "meta_step_size": 0.5}


def stopped(case):
    reseed(1)
    koi = learner(net(), case, False)
    with pytest.raises(Stop):
        koi.train(Stateful(), callbacks=[stops_after(4)])
    return koi


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_goes_on_from_it(case):
    """Written and read by torch, which refuses to read what could execute something."""
    whole, koi = uninterrupted(case, False), stopped(case)
    file = io.BytesIO()
    torch.save(koi.state_dict(), file)
    file.seek(0)
    reseed(2)
    model = net()
    model[1].bias.data.copy_(koi.model[1].bias)  # frozen
    koi = learner(model, case, False)
    koi.load_state_dict(torch.load(file, weights_only=True))
    koi.load_state_dict(koi.state_dict())  # nothing is lost on the way
    koi.train(Stateful())
    assert_same_training(koi, whole)


def test_it_is_what_a_checkpoint_holds(tmp_path):
    from koi import storage

    koi = stopped({"inner_optimizer": "adam"})
    koi.save(tmp_path / "koi")
    saved, state = storage.read(tmp_path / "koi"), koi.state_dict()
    assert list(saved) == list(state)
    for name in ("params", "buffers"):
        assert list(saved[name]) == list(state[name])
        assert all(map(torch.equal, saved[name].values(), state[name].values()))
    assert all(map(torch.equal, saved["moments"], state["moments"]))


@pytest.mark.parametrize("meta_optimizer", [None, lambda p: torch.optim.Adam(p, lr=0.1)])
def test_it_stays_as_it_is(meta_optimizer):
    """Whatever is trained from it, and as often as one goes back to it."""
    settings = {**SETTINGS, "inner_optimizer": "adam", "meta_optimizer": meta_optimizer}
    koi = Koi(small_net(), **settings, seed=0)
    koi.train(Regressions())
    state, ends = koi.state_dict(), []
    for _ in range(2):
        koi.load_state_dict(state)
        assert koi.iteration == 4
        koi.num_iterations = 8
        koi.train(Regressions())
        ends.append(snapshot(koi.model))
        koi.num_iterations = 4
    assert len(koi.history) == 8
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_is_refused_whole():
    """All differences are named, and model and learner are as they were."""
    koi = Koi(small_net(), **SETTINGS, seed=0, inner_optimizer="adam")
    koi.train(Regressions())
    state = koi.state_dict()
    other = Koi(small_net(), **{**SETTINGS, "step_size": 0.2}, seed=0)
    other.train(Regressions())
    before, history = snapshot(other.model), list(other.history)
    with pytest.raises(CheckpointError, match="load_state_dict does not fit") as caught:
        other.load_state_dict(state)
    assert str(caught.value).splitlines()[1:] == [
        "  step_size: 0.1 in the checkpoint, 0.2 here",
        "  inner_optimizer: 'adam' in the checkpoint, 'sgd' here",
        "  inner_optimizer: gave torch.optim.adam.Adam for the checkpoint, "
        "torch.optim.sgd.SGD here",
    ]
    with pytest.raises(CheckpointError, match=r"2\.weight is a parameter"):
        Koi(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).load_state_dict(state)
    with pytest.raises(CheckpointError, match="not whole"):
        other.load_state_dict({"settings": state["settings"]})
    assert_same(other.model, before)
    assert (other.iteration, other.history) == (4, history)


def test_nothing_is_loaded_in_the_middle_of_a_training():
    koi = Koi(small_net(), **SETTINGS)
    state = koi.state_dict()
    with pytest.raises(CheckpointError, match=r"while koi\.train runs"):
        koi.train(Regressions(), callbacks=[lambda koi, _: koi.load_state_dict(state)])
    koi.load_state_dict(state)
    assert koi.iteration == 0


def test_only_the_learner_knows_its_private_attributes():
    """As the source reads: elsewhere no `koi._x`, `self._koi._x` or `learner._x`."""
    root = Path(package.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(root.rglob("*.py"))
        if path.name not in ("learner.py", "adapting.py", "stored.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1] in ("koi", "_koi", "learner", "_learner")
    ]
    assert not found, "\n".join(found)
