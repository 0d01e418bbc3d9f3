"""Checkpoints with a right checksum in which something else stands: read, or refused by a sentence.

Never an error of torch's or Python's, and never other numbers than those of the training.
"""

import math

import pytest
import torch

from forgeries import (
    LEARNERS,
    Missing,
    answer,
    at,
    checkpoint_of,
    edited,
    go_on_from,
    momentum,
    places,
)
from koi import CheckpointError, ConfigurationError, Koi, storage
from toys import Regressions, small_net


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What the checkpoint of each kind of learner holds."""
    return {
        name: checkpoint_of(kind, tmp_path_factory.mktemp("made"))
        for name, kind in LEARNERS.items()
    }


# Where something stands and what is put there; for "*" the first of what is there.
NAN = torch.full((4, 3), math.nan)
FORGED = [
    *(("adam", path, value) for path in ("moments",) for value in ([], [torch.zeros(3)], "x")),
    *(("adam", f"moments.{i}", torch.zeros(1)) for i in (0, 4, 8)),
    *(("adam", "moments.0", value) for value in (NAN, torch.ones(4, 3).bool(), None, Missing)),
    ("adam", "moments.8", torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)),
    ("adam", "moments.2", torch.zeros(4, dtype=torch.complex64)),
    ("adam", "moment_devices", []),
    ("adam", "devices.0", 3),
    ("adam", "params.0.weight", Missing),
    ("adam", "params.0.weight", torch.zeros(4, 3, dtype=torch.float64)),
    ("adam", "params.more", torch.zeros(3)),
    ("adam", "iteration", 2),
    ("adam", "iteration", -1),
    ("adam", "iteration", 2.5),
    ("adam", "settings.num_steps", 0.5),
    ("adam", "settings.num_steps", Missing),
    ("adam", "settings.inner_optimizer", "sgd"),
    ("adam", "settings.inner_schedule", ()),
    ("adam", "settings", {3: 4}),
    ("adam", "inner_optimizer", {}),
    ("adam", "inner_optimizer.class", 3),
    *(("adam", f"inner_optimizer.betas.{i}", torch.zeros(3)) for i in (0, 1)),
    ("adam", "history.rows", torch.zeros(3, 9)),
    ("adam", "history.rows", torch.full((3, 9), math.nan)),
    ("adam", "history.rows", torch.zeros(3, 9).long()),
    ("adam", "history.columns", ["iteration"] * 9),
    ("adam", "history.before", -1),
    ("adam", "history.before", "x"),
    ("rmsprop", "moments.0", Missing),
    ("momentum", "moments.1", torch.zeros(4, 1)),
    ("momentum", "mean.values.0", torch.zeros(1)),
    ("momentum", "mean.values", []),
    ("momentum", "mean.count", -1),
    ("momentum", "mean", None),
    *(("meta-adam", f"meta_state.state.0.{name}", Missing) for name in ("step", "exp_avg")),
    *(("meta-adam", "meta_state.state.0.step", value) for value in ("x", -5, torch.tensor(-5.0))),
    *(
        ("meta-adam", "meta_state.state.1.exp_avg_sq", value)
        for value in (torch.zeros(1), torch.zeros(1, 4), torch.zeros(0), NAN, torch.tensor(1j), 3)
    ),
    ("meta-adam", "meta_state.state.1", Missing),
    ("meta-adam", "meta_state.state.1", {"extra": 1}),
    ("meta-adam", "meta_state.state", []),
    ("meta-adam", "meta_state.param_groups", []),
    ("meta-adam", "meta_state.param_groups.0.params", [1, 0, 2, 3]),
    ("meta-adam", "meta_state.param_groups.0.params", [0]),
    ("meta-adam", "meta_state.param_groups.0.lr", -1.0),
    ("meta-adam", "meta_state.param_groups.0.lr", Missing),
    ("meta-adam", "meta_state.param_groups.0.eps", 10**30),
    ("meta-adam", "meta_state.param_groups.0.weight_decay", 10**30),
    ("meta-adam", "meta_state.param_groups.0.weight_decay", -(10**400)),
    ("meta-sgd", "meta_state.param_groups.0.momentum", 2**64),
    ("meta-sgd", "meta_state.param_groups.0.dampening", torch.zeros(3)),
    ("meta-adam", "meta_state.state.0.step", 10**400),
    ("meta-adam", "meta_state.state.0.exp_avg", torch.zeros(4, 3, dtype=torch.float64)),
    ("meta-sgd", "meta_state.state.0.momentum_buffer", torch.zeros(4, 3, dtype=torch.float64)),
    ("meta-adam", "meta_state.param_groups.0.betas", (0.9,)),
    ("meta-adam", "meta_state.param_groups.0.betas", "x"),
    ("meta-adam", "meta_state.param_groups.0.eps", None),
    ("meta-adam", "meta_state.param_groups.0.params.3", torch.zeros(3)),
    ("meta-adam", "meta_state.param_groups.0.capturable", (1,)),
    ("meta-adam", "meta_state", None),
    ("meta-adam", "settings.meta_optimizer.1", Missing),
    ("meta-adam", "meta_optimizer.weight_decay", torch.zeros(3)),
    ("meta-adam", "meta_optimizer", None),
    ("meta-adam", "meta_optimizer.lr", 3),
    ("meta-sgd", "meta_state.state.0.momentum_buffer", torch.zeros(2)),
    ("meta-sgd", "meta_state.state.0.momentum_buffer", None),
    ("meta-sgd", "meta_state.state.0.momentum_buffer", "x"),
    ("meta-sgd", "meta_state.param_groups.0.momentum", "x"),
    ("meta-sgd", "meta_state.param_groups.0.dampening", (1,)),
    ("meta-sgd", "meta_state.state.1", None),
    *(("layer", "learned_rates.0", value) for value in (torch.ones(3), torch.ones(2, 1), None)),
    ("layer", "learned_rates.0", torch.full((2,), math.nan)),
    ("layer", "learned_rates", []),
    ("layer", "settings.learn_step_size", "parameter"),
    ("layer", "best.phi.0", torch.zeros(1)),
    ("layer", "best.phi", []),
    ("layer", "best.value", "x"),
    ("layer", "best.iteration", Missing),
    ("layer", "best", []),
    ("parameter", "learned_rates.1", torch.ones(1)),
    ("parameter", "meta_state.state.5.exp_avg", torch.ones(1)),
    ("no seed", "generators", []),
    ("no seed", "generators.0", None),
    ("no seed", "generators.2", torch.zeros(3)),
    ("no seed", "callbacks", None),
    ("no seed", "callbacks", "x"),
    ("no seed", "drawn_seed", -1),
    ("buffers", "buffers.1.running_mean", Missing),
    ("buffers", "buffers.1.running_mean", torch.zeros(5)),
    ("buffers", "buffers.more", torch.zeros(5)),
    ("buffers", "best.moments", [torch.zeros(2)] * 13),
    ("half", "scale", (0.0, 3)),
    ("half", "scale", (math.inf, 3)),
    ("half", "scale", (2.0,)),
    ("half", "scale", "x"),
    ("half", "owed", {"num_callbacks": "x"}),
]
READ = [("no seed", "callbacks", None)]  # a checkpoint of before there were any states


def key_of(data, path):
    """Return the way to a place in nested data, whose names can have dots in them."""
    return next(where for where in places(data) if ".".join(map(str, where)) == path)


@pytest.mark.parametrize(("name", "path", "value"), FORGED, ids=lambda part: str(part)[:40])
def test_what_cannot_be_is_refused_by_its_name(name, path, value, checkpoints, tmp_path):
    data, file = checkpoints[name], tmp_path / "forged"
    above, _, last = path.rpartition(".")
    known = [where for where in places(data) if ".".join(map(str, where)) == path]
    where = known[0] if known else (*(key_of(data, above) if above else ()), last)
    storage.write(file, edited(data, where, value))
    if (name, path, value) in READ:
        go_on_from(LEARNERS[name], file)
        return
    with pytest.raises(CheckpointError) as caught:
        go_on_from(LEARNERS[name], file)
    assert str(file) in str(caught.value)
    said = str(caught.value)
    assert where[0] in said or where[0] in ("settings", "generators", "params", "buffers")


def test_moments_of_an_optimizer_that_koi_does_not_know(checkpoints, tmp_path):
    """What it keeps is known when it steps."""
    forged = edited(checkpoints["rmsprop"], ("moments", 0), torch.zeros(2))
    storage.write(tmp_path / "forged", forged)
    with pytest.raises(ConfigurationError, match=r"do not fit inner_optimizer \(shape \(2,\)"):
        go_on_from(LEARNERS["rmsprop"], tmp_path / "forged")


def test_a_whole_one_of_each_kind_is_read(checkpoints, tmp_path):
    for name, kind in LEARNERS.items():
        assert answer(kind, tmp_path / "whole", checkpoints[name]) is None
        assert at(checkpoints[name], ("iteration",)) == 3


def test_negative_moments_of_a_model_in_float64_are_no_steps():
    """Velocities are; the last of them has the form of Adam's counts."""
    koi, other = (Koi(small_net().double(), inner_optimizer=momentum) for _ in range(2))
    state = koi.state_dict()
    moments = [-torch.ones_like(value) for value in state["params"].values()]
    other.load_state_dict({**state, "moments": moments, "moment_devices": ["cpu"] * len(moments)})
    assert other.state_dict()["moments"][-1].tolist() == [-1.0, -1.0]


def test_nothing_has_changed_where_one_is_refused(checkpoints):
    koi = Koi(small_net(), 0.05, 2, 4, inner_optimizer="adam", seed=0, check=False)
    before = koi.state_dict()
    forged = edited(checkpoints["adam"], ("moments", 0), torch.zeros(1))
    with pytest.raises(
        CheckpointError, match=r"given to load_state_dict does not fit.*\n  moments"
    ):
        koi.load_state_dict(forged)
    after = koi.state_dict()
    assert after["iteration"] == before["iteration"] == 0
    for name, value in before["params"].items():
        assert torch.equal(value, after["params"][name])


class TestOtherSettings:
    """Where `Koi.load` is given others than there were."""

    def test_roles(self, tmp_path):
        koi = Koi(small_net(), learns="0.*", adapts="0.*")
        koi.save(tmp_path / "koi")
        with pytest.raises(CheckpointError, match=r"params: .*not 2\.weight.*adapts and learns"):
            Koi.load(tmp_path / "koi", koi.model, learns=None, adapts=None)

    @pytest.mark.parametrize("kind", [None, "parameter"])
    def test_other_learned_rates_begin_anew(self, kind, checkpoints, tmp_path):
        """With them the exponential mean, of which they are a part."""
        storage.write(tmp_path / "koi", checkpoints["layer"])
        koi = Koi.load(tmp_path / "koi", small_net(), learn_step_size=kind)
        koi.train(Regressions(), validate=lambda koi: 9.0)
        assert koi.iteration == 4
        assert koi.best.iteration < 4
        assert koi.averaged().model is not koi.model
