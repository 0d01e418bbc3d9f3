"""Files from elsewhere: neither their sizes nor what they hold is believed unchecked."""

import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from koi import CheckpointError, ConfigurationError, DataError, Koi, storage
from koi.fewshot.images import ImageForm
from koi.lab.runs import Classifier
from koi.models import omniglot_net
from toys import Regressions, small_net


def forged(path, entries, content=b"", data='{"dict": []}'):
    """Write a checkpoint with any header and a right checksum."""
    metadata = {"sha256": "0" * 64, "koi_format": "1", "koi": data}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    whole = len(header).to_bytes(8, "little") + header + content
    digest = hashlib.sha256(whole).hexdigest().encode()
    path.write_bytes(whole.replace(b"0" * 64, digest, 1))
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("entries", "content"),
    [
        ({"a": entry([2**60], 0, 8)}, bytes(8)),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        ({"a": entry([2], 8, 16)}, bytes(16)),
        ({"a": entry([2], 0, 8)}, bytes(16)),
        ({"a": entry([-1, -2], 0, 8)}, bytes(8)),
        ({"a": entry([True, 2], 0, 8)}, bytes(8)),
        ({"a": entry([2], 0, 8, "F99")}, bytes(8)),
        ({"a": 3}, b""),
    ],
    ids=["huge", "shared", "hole", "rest", "negative", "bool", "type", "no entry"],
)
def test_tensors_that_do_not_fill_the_file(entries, content, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be understood"):
        storage.read(forged(tmp_path / "forged", entries, content))


def test_the_forgery_itself_is_good(tmp_path):
    read = storage.read(forged(tmp_path / "f", {"a": entry([2], 0, 8)}, bytes(8)))
    assert read == {}


@pytest.mark.parametrize(
    "data", ["[" * 100_000, "3", '{"numpy": ["|O", [1], "AAAAAAAAAAA="]}', '{"set": [{"dict":[]}]}']
)
def test_what_is_no_data(data, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be understood"):
        storage.read(forged(tmp_path / "forged", {}, data=data))


def test_header_without_end(tmp_path):
    path = forged(tmp_path / "forged", {})
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="is damaged"):
        storage.read(path)


def test_file_with_holes(tmp_path):
    path = forged(tmp_path / "forged", {})
    os.truncate(path, 2**42)
    with pytest.raises(CheckpointError, match=r"4,398,046,511,104 bytes, more than this machine"):
        storage.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is a pipe or a device"):
        Koi.load(tmp_path / "pipe", small_net())
    with pytest.raises(CheckpointError, match="directory"):
        storage.read(tmp_path)


def of_numpy(**changed):
    """Return a change of NumPy's state."""

    def change(states):
        python, numpy, *rest = states
        names = ("name", "key", "pos", "has_gauss", "gauss")
        return (python, tuple({**dict(zip(names, numpy, strict=True)), **changed}.values()), *rest)

    return change


def of_torch(left, position):
    """Return a change of where torch's generator stands."""

    def change(states):
        state = states[2].clone()
        content = struct.pack("=iiQ", left, 1, position)
        state[8:24] = torch.tensor(list(content), dtype=torch.uint8)
        return (*states[:2], state, *states[3:])

    return change


@pytest.mark.parametrize(
    "change",
    [
        of_numpy(pos=5_000_000),
        of_numpy(pos=-1),
        of_numpy(key=torch.ones(3)),
        of_numpy(name="PCG64"),
        of_numpy(gauss="x"),
        of_torch(624, 624),
        of_torch(1, 2**40),
        lambda states: ((3, (1,) * 624 + (700,), None), *states[1:]),
        lambda states: (*states[:2], torch.zeros(3), *states[3:]),
        lambda states: states[:2],
        lambda states: "all",
    ],
)
def test_states_in_which_no_generator_can_be(change, tmp_path):
    """With the first of them, NumPy ended the process as soon as something was drawn."""
    koi = Koi(small_net(), num_iterations=2)
    koi.train(Regressions(), checkpoint_dir=tmp_path)
    path = tmp_path / "iteration-000000002.safetensors"
    data = storage.read(path)
    assert Koi.load(path, small_net()).iteration == 2
    storage.write(path, {**data, "generators": change(data["generators"])})
    with pytest.raises(CheckpointError, match="is not whole"):
        Koi.load(path, small_net())


def classifier(**changed):
    """Return what a classifier's file holds."""
    support = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    kept = {"network": "omniglot", "classes": ("a", "b"), "support": support}
    weights = omniglot_net(2).state_dict()
    return {"classifier": {**kept, **changed}, "weights": weights}


def with_weight(name, tensor):
    data = classifier()
    data["weights"][name] = tensor
    return data


FORGED = {
    "many outputs": with_weight("13.bias", torch.zeros(400_000, dtype=torch.uint8)),
    "no outputs": with_weight("13.bias", torch.tensor(1.0)),
    "more weights": with_weight("14.bias", torch.zeros(2)),
    "types": with_weight("13.bias", torch.zeros(2, dtype=torch.int32)),
    "no network": classifier(network="of another"),
    "a list": classifier(network=[]),
    "one class": classifier(classes=("a",)),
    "class twice": classifier(classes=("a", "a")),
    "too many": classifier(classes=("a", "b", "c")),
    "numbers": classifier(classes=(1, 2)),
    "no classes": classifier(classes=None),
    "small": classifier(support=torch.zeros(400_000, 1, 1, 1, dtype=torch.uint8)),
    "none": classifier(support=torch.zeros(0, 1, 28, 28, dtype=torch.uint8)),
    "floats": classifier(support=torch.zeros(2, 1, 28, 28)),
    "no support": classifier(support="x"),
    "no weights": {**classifier(), "weights": {}},
    "a word": {**classifier(), "classifier": "x"},
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED)
def test_forged_classifiers(data, tmp_path):
    """The first made 3 GB of 470 kB."""
    storage.write(tmp_path / "forged", data)
    with pytest.raises(CheckpointError, match="holds no classifier"):
        Classifier.load(tmp_path / "forged")


def test_a_classifier_is_what_it_was(tmp_path):
    made = omniglot_net(3, torch_defaults=True)
    support = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    before = Classifier("omniglot", ("a", "b"), made, support, torch_defaults=True)
    before.save(tmp_path / "file")
    after = Classifier.load(tmp_path / "file")
    assert (after.classes, after.torch_defaults) == (("a", "b"), True)
    torch.testing.assert_close(after.probabilities(support), before.probabilities(support))
    assert np.isfinite(after.probabilities(support).numpy()).all()


def png_of(width, height, path):
    """Write a small PNG whose header names a size."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    return path


class TestPixels:
    def test_a_limit_in_pixels(self, tmp_path):
        """One of 22 kB took 2.4 GB and 8.5 s."""
        path = png_of(13_377, 13_377, tmp_path / "vast.png")
        with pytest.raises(DataError, match=r"13377 × 13377 .*67,108,864 are read: .*KOI_MAX_PIX"):
            ImageForm(28, "L").read(path)

    def test_it_can_be_another(self, tmp_path, monkeypatch):
        path = tmp_path / "small.png"
        Image.new("L", (10, 10)).save(path)
        with pytest.raises(DataError, match="at most 99 are read"):
            ImageForm(28, "L", max_pixels=99).read(path)
        monkeypatch.setenv("KOI_MAX_PIXELS", "99")
        with pytest.raises(DataError, match="at most 99 are read"):
            ImageForm(28, "L").check(path)
        assert ImageForm(28, "L", max_pixels=100).read(path).shape == (1, 28, 28)
        monkeypatch.setenv("KOI_MAX_PIXELS", "many")
        with pytest.raises(ConfigurationError, match="KOI_MAX_PIXELS = 'many': must be a number"):
            ImageForm(28, "L").read(path)

    def test_pillows_own_limit_gives_way_to_it(self, tmp_path):
        path, before = png_of(20_000, 20_000, tmp_path / "vast.png"), Image.MAX_IMAGE_PIXELS
        with pytest.raises(DataError, match="13 are read"):
            ImageForm(28, "L", max_pixels=13).check(path)
        ImageForm(28, "L", max_pixels=400_000_000).check(path)
        assert before == Image.MAX_IMAGE_PIXELS

    def test_what_is_no_image_of_these_kinds(self, tmp_path):
        """Whatever its name says: for PostScript Pillow would start another program."""
        (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        os.mkfifo(tmp_path / "b.png")
        for name, problem in {
            "a.png": "no image that is",
            "b.png": "a pipe or a device",
        }.items():
            with pytest.raises(DataError, match=problem):
                ImageForm(28, "L").read(tmp_path / name)
