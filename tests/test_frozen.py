"""Frozen weights are in no checkpoint, so that others in their place are found out."""

import pytest
import torch
from torch import nn

from koi import CheckpointError, Koi, memory, storage
from koi.training import frozen
from toys import Regressions, assert_same, snapshot

SETTINGS = {"step_size": 0.1, "num_steps": 2, "num_iterations": 4, "seed": 0}


def net(seed):
    """3 → 5 → 2, the first layer frozen as it was drawn."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoint of a training, and the model that came of it."""
    koi = Koi(net(0), **SETTINGS)
    koi.train(Regressions(), checkpoint_dir=tmp_path)
    return tmp_path, koi.model


def assert_refused(model, folder, match):
    before = snapshot(model)
    koi = Koi(model, **SETTINGS)
    with pytest.raises(CheckpointError, match=match):
        koi.train(Regressions(), checkpoint_dir=folder, resume=True)
    assert koi.iteration == 0
    assert_same(model, before)
    (path,) = folder.iterdir()
    with pytest.raises(CheckpointError, match=match):
        Koi.load(path, model)
    assert_same(model, before)


def test_drawn_anew(saved):
    assert_refused(
        net(1),
        saved[0],
        r"does not fit.*\n  model: the frozen parameters 0\.weight, 0\.bias had other values, "
        r"which no checkpoint holds: seed torch before the model is built, or load the weights",
    )


def test_one_number_is_another(saved):
    model = net(0)
    with torch.no_grad():
        model[0].bias[3] += 1e-7
    assert_refused(model, saved[0], r"the frozen parameters 0\.bias had other values")


def test_many_are_counted(tmp_path):
    def deep():
        body = [nn.Linear(3, 3).requires_grad_(False) for _ in range(4)]
        return nn.Sequential(*body, nn.Linear(3, 2))

    Koi(deep(), **SETTINGS).train(Regressions(), checkpoint_dir=tmp_path)
    assert_refused(deep(), tmp_path, r"0\.weight, 0\.bias, 1\.weight, 1\.bias and 4 more had")


def test_another_form_is_said_first(saved):
    model = nn.Sequential(nn.Linear(3, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 2))
    with pytest.raises(CheckpointError, match=r"0\.bias is a frozen parameter") as caught:
        Koi(model, **SETTINGS).train(Regressions(), checkpoint_dir=saved[0], resume=True)
    assert "had other values" not in str(caught.value)


def test_the_same_weights_are_taken(saved):
    """Drawn with the same seed, or loaded."""
    folder, model = saved
    (path,) = folder.iterdir()
    again = net(0)
    Koi(again, **SETTINGS).train(Regressions(), checkpoint_dir=folder, resume=True)
    assert_same(again, model)
    other = net(1)
    other[0].load_state_dict(model[0].state_dict())
    assert_same(Koi.load(path, other).model, model)


def test_checkpoint_without_a_digest_is_read(saved):
    folder, model = saved
    (path,) = folder.iterdir()
    data = storage.read(path)
    del data["frozen"]
    storage.write(path, data)
    other = net(1)
    Koi(other, **SETTINGS).train(Regressions(), checkpoint_dir=folder, resume=True)
    assert torch.equal(other[2].weight, model[2].weight)


class TestCost:
    """A large part is gone through again only when it has changed."""

    @pytest.fixture
    def model(self):
        model = nn.Sequential(nn.Linear(3, 1000), nn.Tanh(), nn.Linear(1000, 2))
        model[0].requires_grad_(False)
        return model

    @pytest.fixture
    def whole(self, model, monkeypatch):
        """How often the frozen layer's weight is gone through as a whole."""
        seen = []
        original = memory.pieces_of

        def counting(tensor):
            if tensor.numel() == 3000:
                seen.append(tensor)
            return original(tensor)

        monkeypatch.setattr(memory, "pieces_of", counting)
        return seen

    def test_once_for_many_saves(self, model, whole, tmp_path):
        koi = Koi(model, **SETTINGS)
        koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=1)
        koi.save(tmp_path / "by hand")
        koi.num_iterations = 6
        koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=1)
        assert len(whole) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda weight: weight.mul_(0.9),
            lambda weight: weight.data.mul_(0.9),
            lambda weight: setattr(weight, "data", 0.9 * weight.data),
        ],
        ids=["in place", "through .data", "other data"],
    )
    def test_again_once_it_has_changed(self, change, model, whole, tmp_path):
        """As a teacher does that follows its pupil."""

        @torch.no_grad()
        def follow(koi, record):
            if record.iteration == 1:
                change(koi.model[0].weight)

        before = {name: value.clone() for name, value in model.state_dict().items()}
        koi = Koi(model, **SETTINGS)
        koi.train(Regressions(), callbacks=[follow], checkpoint_dir=tmp_path, checkpoint_every=1)
        assert len(whole) == 2
        newest = max(tmp_path.iterdir())
        model.load_state_dict(before)
        with pytest.raises(CheckpointError, match=r"the frozen parameters 0\.weight had"):
            Koi.load(newest, model)


class Wraps(torch.Tensor):
    """Has its values elsewhere, as quantised weights have."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise AssertionError(f"{function} was asked of it")


def test_what_wraps_other_tensors_has_no_digest():
    assert list(frozen.digests({"plain": torch.zeros(2), "wraps": Wraps()})) == ["plain"]
