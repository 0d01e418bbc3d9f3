"""The files: what they hold, refused where they are not right, and nothing in them executed."""

import pickle

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from koi import CheckpointError, Koi, linear, storage
from toys import InTurn, Quadratic, Regressions, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.1, "num_steps": 2, "num_iterations": 4, "meta_step_size": 0.5}


def trained(model=None, **settings):
    koi = Koi(small_net() if model is None else model, **SETTINGS | {"seed": 0} | settings)
    koi.train(Regressions() if model is None else InTurn(Quadratic(0.0)))
    return koi


def assert_refused(path, match, model=None, **settings):
    """Loading it is an error that names the file, and leaves the model as it is."""
    model = small_net() if model is None else model
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        Koi.load(path, model, **settings)
    assert str(path) in str(caught.value)
    assert_same(model, before)
    return str(caught.value)


VALUES = {
    "scalars": {"a": [None, True, 3, -(2**70), 0.1, float("inf"), "é\n", b"\0\xff"]},
    "containers": {"a": ((), [1, (2, [3])], {1: {"b": {2.5: None}}, None: 0}, {1, 2})},
    "keys that read the same": {"a": {"b.c": torch.ones(1), "b": {"c": torch.zeros(1)}}},
    "types": {"a": [torch.float32, torch.bfloat16]},
    "odd names": {"a": {"": torch.ones(1), "__metadata__": torch.ones(2), "é": torch.ones(3)}},
    "numpy": {"a": [np.arange(6, dtype=np.uint32).reshape(2, 3), np.float32(0.1)]},
    "digests": {"0" * 64: "0" * 64, "sha256": '{"sha256":"' + "0" * 64},
}


class TestContent:
    @pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
    def test_nested_data(self, value, tmp_path):
        storage.write(tmp_path / "file", value)
        assert_equal(storage.read(tmp_path / "file"), value)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.tensor(1.5),
            torch.zeros(0, 3),
            torch.arange(6.0).reshape(2, 3).t(),
            torch.arange(9)[::2],
            torch.ones(1).expand(4),
            torch.randn(3).bfloat16(),
            torch.tensor([1 + 2j]).conj(),
            torch.tensor([True, False]),
            torch.tensor([float("nan"), -0.0]),
            nn.Parameter(torch.randn(2)),
        ],
    )
    def test_tensors(self, tensor, tmp_path):
        storage.write(tmp_path / "file", {"odd": torch.tensor([True]), "t": tensor})
        assert_equal(storage.read(tmp_path / "file")["t"], tensor.detach())

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (object(), "object"),
            (print, "builtin_function"),
            (torch.zeros(2).to_sparse(), "tensor"),
            (torch.zeros(2, device="meta"), "tensor"),
            (np.array([None]), "ndarray"),
        ],
    )
    def test_what_a_file_cannot_hold(self, value, kind, tmp_path):
        with pytest.raises(CheckpointError, match=rf"hold a\.b\[1\], of type .*{kind}"):
            storage.write(tmp_path / "file", {"a": {"b": [0, value]}})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
    def test_quantised_tensors_are_refused(self, tmp_path):
        tensor = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
        with pytest.raises(CheckpointError, match=r"cannot hold odd, of type torch\.qint8 tensor"):
            storage.write(tmp_path / "file", {"odd": tensor})

    def test_file_is_a_safetensors_file(self, tmp_path):
        koi = trained(inner_optimizer="adam")
        koi.save(tmp_path / "koi.safetensors")
        tensors = safetensors.torch.load_file(tmp_path / "koi.safetensors")
        assert torch.equal(tensors["params.0.weight"], koi.model[0].weight)
        with safetensors.safe_open(tmp_path / "koi.safetensors", "pt") as file:
            assert file.metadata()["koi_format"] == "1"

    def test_nothing_is_unpickled(self, tmp_path, monkeypatch):
        trained().save(tmp_path / "koi")

        def refuse(*arguments, **options):
            raise AssertionError

        for module, name in [(pickle, "load"), (pickle, "loads"), (torch, "load")]:
            monkeypatch.setattr(module, name, refuse)
        Koi.load(tmp_path / "koi", small_net())

    def test_settings_are_restored(self, tmp_path):
        settings = {
            "step_size": 0.3,
            "num_steps": 5,
            "num_iterations": 17,
            "meta_step_size": linear(0.5, 0.25),
            "meta_batch_size": 3,
            "inner_optimizer": "adam",
            "inner_state": "reset",
            "algorithm": "fomaml",
            "vectorize": False,
            "compile": "reduce-overhead",
            "seed": 5,
            "on_nonfinite": "skip",
            "chunk_size": 2,
            "autocast": torch.bfloat16,
        }
        Koi(small_net(), **settings).save(tmp_path / "koi")
        koi = Koi.load(tmp_path / "koi", small_net())
        assert {name: getattr(koi, name) for name in settings} == settings

    def test_settings_can_be_replaced(self, tmp_path):
        trained(inner_optimizer="adam").save(tmp_path / "koi")
        koi = Koi.load(tmp_path / "koi", small_net(), step_size=0.2, num_iterations=9)
        assert (koi.step_size, koi.num_iterations, koi.iteration) == (0.2, 9, 4)

    def test_shared_and_tied_parameters(self, tmp_path):
        model = nn.LSTM(2, 3)  # torch flattens its weights into one block of memory
        model.again = model.weight_hh_l0
        Koi(model).save(tmp_path / "koi")
        other = nn.LSTM(2, 3)
        other.again = other.weight_hh_l0
        Koi.load(tmp_path / "koi", other)
        assert_same(other, model)
        assert other.again is other.weight_hh_l0


def assert_equal(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    elif isinstance(expected, np.ndarray | np.generic):
        assert actual.dtype == expected.dtype
        assert np.array_equal(actual, expected)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_equal(*pair)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_equal(actual[key], expected[key])
    else:
        assert actual == expected


class TestRefused:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "koi.safetensors"
        storage.write(path, {"params": {"weight": torch.tensor([1.5])}, "settings": [0.1, "sgd"]})
        return path

    def test_cut_anywhere(self, file):
        content = file.read_bytes()
        for size in range(len(content)):
            file.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"damaged.*an earlier one$"):
                storage.read(file)

    def test_one_flipped_bit_in_any_byte(self, file):
        content = file.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"damaged.*an earlier one$"):
                storage.read(file)

    @pytest.mark.parametrize("more", [b"\0", b"x" * 1000])
    def test_something_added(self, file, more):
        file.write_bytes(file.read_bytes() + more)
        assert_refused(file, "damaged")

    def test_the_last_good_one_is_offered(self, tmp_path):
        koi = Koi(small_net(), **SETTINGS, seed=0)
        koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=1)
        before, newest = sorted(tmp_path.iterdir())
        newest.write_bytes(newest.read_bytes()[:-1])
        message = assert_refused(newest, "is damaged.*use an earlier one")
        assert message.endswith(f"({before} is good)")
        before.write_bytes(b"")
        assert_refused(newest, "none in its folder before it is good")

    def test_of_another_program(self, tmp_path):
        path = tmp_path / "file"
        plain = safetensors.torch.save({"weight": torch.zeros(2)}, {"format": "pt"})
        torch.save(small_net().state_dict(), path)
        for content in [path.read_bytes(), plain, b"", b"{}", b"\xff" * 500, b"\x89PNG\r\n"]:
            path.write_bytes(content)
            assert_refused(path, r"is no checkpoint of Koi.*give a file")

    def test_not_there(self, tmp_path):
        assert_refused(tmp_path / "nothing", "cannot be read")
        assert_refused(tmp_path, "cannot be read")

    def test_newer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(storage, "FORMAT", 2)
        trained().save(tmp_path / "koi")
        monkeypatch.undo()
        assert_refused(tmp_path / "koi", "has format 2 and this Koi reads format 1.*or a newer one")

    def test_other_data(self, tmp_path):
        storage.write(tmp_path / "koi", {"settings": 3})
        assert_refused(tmp_path / "koi", "is not whole")
        storage.write(tmp_path / "other", {"classifier": 3, "weights": {}})
        assert_refused(tmp_path / "other", "holds no learner: give a file that koi.save or koi.tr")


class TestMisfit:
    def test_model(self, tmp_path):
        trained().save(tmp_path / "koi")
        other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(4, 2).double())
        other[2].bias.requires_grad_(False)
        message = assert_refused(tmp_path / "koi", "does not fit", other)
        assert message.splitlines()[1:] == [
            f"  model: {line}"
            for line in [
                "0.weight is a parameter of shape (4, 3), float32 in the checkpoint, "
                "a parameter of shape (5, 3), float32 here",
                "0.bias is a parameter of shape (4,), float32 in the checkpoint, "
                "a parameter of shape (5,), float32 here",
                "2.weight is a parameter of shape (2, 4), float32 in the checkpoint, "
                "a parameter of shape (2, 4), float64 here",
                "2.bias is a parameter of shape (2,), float32 in the checkpoint, "
                "a frozen parameter of shape (2,), float64 here",
                "1.weight is missing in the checkpoint, a parameter of shape (5,), float32 here",
                "1.bias is missing in the checkpoint, a parameter of shape (5,), float32 here",
                "1.running_mean is missing in the checkpoint, a buffer of shape (5,), float32 here",
                "1.running_var is missing in the checkpoint, a buffer of shape (5,), float32 here",
                "1.num_batches_tracked is missing in the checkpoint, "
                "a buffer of shape (), int64 here",
            ]
        ]

    def test_settings(self, tmp_path):
        koi = Koi(small_net(), **SETTINGS, seed=0, inner_optimizer="adam")
        koi.train(Regressions(), checkpoint_dir=tmp_path)
        changed = {"step_size": 0.2, "num_steps": 3, "meta_step_size": linear(0.5, 0), "seed": None}
        model = small_net()
        before = snapshot(model)
        koi = Koi(model, **SETTINGS | changed, meta_optimizer=torch.optim.SGD)
        with pytest.raises(CheckpointError, match="does not fit") as caught:
            koi.train(Regressions(), checkpoint_dir=tmp_path, resume=True)
        assert sorted(str(caught.value).splitlines()[1:]) == sorted(
            [
                "  step_size: 0.1 in the checkpoint, 0.2 here",
                "  num_steps: 2 in the checkpoint, 3 here",
                "  meta_step_size: 0.5 in the checkpoint, linear(start=0.5, end=0.0) here",
                "  inner_optimizer: 'adam' in the checkpoint, 'sgd' here",
                "  meta_optimizer: None in the checkpoint, code (SGD) here",
                "  seed: 0 in the checkpoint, None here",
                "  inner_optimizer: gave torch.optim.adam.Adam for the checkpoint, "
                "torch.optim.sgd.SGD here",
            ]
        )
        assert_same(model, before)
        assert (koi.iteration, koi.history, koi.state_dict()["moments"]) == (0, [], None)

    @pytest.mark.parametrize(
        ("make", "line"),
        [
            (lambda p: torch.optim.Adam(p, lr=0.2), "lr = 0.1 in the checkpoint, 0.2 here"),
            (lambda p: torch.optim.SGD(p, lr=0.1), "gave torch.optim.adam.Adam .*SGD here"),
        ],
    )
    def test_code_that_gives_another_optimizer(self, make, line, tmp_path):
        trained(meta_optimizer=lambda p: torch.optim.Adam(p, lr=0.1)).save(tmp_path / "koi")
        assert_refused(tmp_path / "koi", f"meta_optimizer: {line}", meta_optimizer=make)

    def test_another_inner_optimizer(self, tmp_path):
        trained(inner_optimizer="adam").save(tmp_path / "koi")
        assert_refused(tmp_path / "koi", "inner_optimizer: gave .*Adam", inner_optimizer="sgd")
        koi = Koi.load(tmp_path / "koi", small_net(), inner_optimizer="sgd", inner_state="reset")
        assert koi.state_dict()["moments"] is None

    def test_code_that_is_missing(self, tmp_path):
        def falling(fraction):
            return 1 - fraction

        code = {"meta_step_size": falling, "meta_optimizer": torch.optim.Adam}
        trained(**code).save(tmp_path / "koi")
        assert_refused(
            tmp_path / "koi",
            r"code as meta_step_size \(.*falling\) and meta_optimizer \(Adam\).*again, "
            r"Koi\.load\(path, model, meta_step_size=…, meta_optimizer=…\)",
        )
        Koi.load(tmp_path / "koi", small_net(), **code)

    def test_tasks_that_take_no_state(self, tmp_path):
        class Counting(Regressions):
            def state_dict(self):
                return {"count": 1}

        koi = Koi(small_net(), **SETTINGS)
        koi.train(Counting(), checkpoint_dir=tmp_path)
        model = small_net()
        before = snapshot(model)
        koi = Koi(model, **SETTINGS)
        with pytest.raises(CheckpointError, match="Regressions has no load_state_dict"):
            koi.train(Regressions(), checkpoint_dir=tmp_path, resume=True)
        assert_same(model, before)
        assert koi.iteration == 0

    def test_tasks_whose_state_a_file_cannot_hold(self, tmp_path):
        """Known before the first meta-iteration."""

        class Counting(Regressions):
            def state_dict(self):
                return {"count": object()}

        koi = Koi(small_net(), **SETTINGS)
        with pytest.raises(CheckpointError, match=r"cannot hold tasks\.count, of type object"):
            koi.train(Counting(), checkpoint_dir=tmp_path)
        assert koi.iteration == 0
