"""Omniglot: every form gives the same images; damage is found; nothing broken is left behind."""

import contextlib
import hashlib
import io
import resource
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from koi import ConfigurationError, DataError
from koi.problems import omniglot, omniglot_archives
from koi.problems.omniglot_archives import NUM_DRAWINGS, SIDE, nearest

# Two small archives, numbered in another order than that of their names.
ALPHABETS = {
    "images_background": {"Beta": 2, "Alpha": 1},
    "images_evaluation": {"Gamma": 1, "Delta": 1},
}


def png(drawing):
    file = io.BytesIO()
    Image.fromarray(drawing).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def drawings():
    """What the small archives hold: by name, 20 drawings in black on white."""
    random = np.random.default_rng(0)
    drawings = {}
    for alphabets in ALPHABETS.values():
        for alphabet, count in alphabets.items():
            for number in range(1, count + 1):
                noise = random.random((NUM_DRAWINGS, 15, 15)) < 0.9
                drawings[f"{alphabet}/character{number:02d}"] = noise.repeat(7, 1).repeat(7, 2)
    return drawings


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawings):
    """Return a folder with the small archives in each form."""
    root = tmp_path_factory.mktemp("omniglot")
    for form in ("zips", "npzs", "folders"):
        (root / form).mkdir()
    number = 0
    for archive, alphabets in ALPHABETS.items():
        stacks = []
        with zipfile.ZipFile(root / "zips" / f"{archive}.zip", "w") as file:
            for name in (name for name in drawings if name.split("/")[0] in alphabets):
                number += 1
                stacks.append(drawings[name])
                for k, drawing in enumerate(drawings[name], 1):
                    inside = f"{archive}/{name}/{number:04d}_{k:02d}.png"
                    file.writestr(inside, png(drawing))
                    file.writestr(f"__MACOSX/{archive}/{name}/._{number:04d}_{k:02d}.png", b"x")
        with zipfile.ZipFile(root / "zips" / f"{archive}.zip") as file:
            inside = [name for name in file.namelist() if not name.startswith("__")]
            file.extractall(root / "folders", inside)
        np.savez_compressed(root / "npzs" / f"{archive}.npz", images=np.stack(stacks))
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let the small archives be the official ones."""
    monkeypatch.setattr(omniglot_archives, "ALPHABETS", ALPHABETS)


def everything(data):
    """Return all inputs, shape (num_characters, 20, 1, side, side)."""
    shape = (len(data), NUM_DRAWINGS)
    return data.take(torch.arange(shape[0])[:, None].expand(shape), torch.arange(20).expand(shape))


class TestForms:
    @pytest.mark.parametrize("form", ["zips", "npzs", "folders"])
    def test_every_form_is_the_same(self, made, drawings, form):
        data = omniglot.characters(made / form, image_size=SIDE)
        assert data.classes == tuple(sorted(drawings))
        assert data.counts == [NUM_DRAWINGS] * len(drawings)
        expected = torch.stack([torch.from_numpy(drawings[name]) for name in data.classes])
        assert torch.equal(everything(data), expected.unsqueeze(2).float())

    def test_paper_is_1_and_ink_is_0(self, tmp_path):
        drawing = np.ones((SIDE, SIDE), bool)
        drawing[50:55] = False
        for k in range(20):
            (tmp_path / "A" / "character01").mkdir(parents=True, exist_ok=True)
            (tmp_path / "A" / "character01" / f"{k:02d}.png").write_bytes(png(drawing))
        image = everything(omniglot.characters(tmp_path, image_size=21))[0, 0, 0]
        assert image[10].tolist() == [0.0] * 21
        assert image[:10].min() == image[11:].min() == 1.0

    def test_one_archive_several_and_an_alphabet_folder_of_its_own(self, made):
        zips = made / "zips"
        one = omniglot.characters(zips / "images_evaluation.zip")
        assert one.classes == ("Delta/character01", "Gamma/character01")
        both = omniglot.characters([zips / "images_evaluation.zip", made / "npzs" / BACKGROUND])
        assert len(both) == 5
        again = omniglot.characters(made / "folders" / "images_evaluation")
        assert torch.equal(everything(one), everything(again))

    @given(st.integers(1, 2 * SIDE), st.integers(0, 1000))
    def test_resizing_is_pillows(self, image_size, seed):
        noise = np.random.default_rng(seed).random((SIDE, SIDE)) < 0.5
        resized = Image.fromarray(noise).resize((image_size, image_size))
        pixels = nearest(image_size).numpy()
        assert (np.array(resized) == noise[pixels][:, pixels]).all()

    @pytest.mark.parametrize("image_size", [0, -28, 2.5, True, None])
    def test_sizes_that_cannot_be(self, image_size):
        with pytest.raises(ConfigurationError, match="must be a whole number of at least 1"):
            omniglot.characters("nowhere", image_size=image_size)


BACKGROUND = "images_background.npz"


class TestSplit:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(omniglot, "NUM_TRAINING", 3)

    def test_parts_and_rotations(self, made, drawings):
        splits = omniglot.load(made / "npzs", num_validation=1, seed=5)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 1, 2]
        upright = splits.train.classes[:2]
        ends = ("", "@90", "@180", "@270")
        assert splits.train.classes == tuple(name + end for end in ends for name in upright)
        assert {*upright, *splits.validation.classes, *splits.test.classes} == {*drawings}
        images = everything(splits.train)
        for number, name in enumerate(splits.train.classes):
            original, _, angle = name.partition("@")
            small = Image.fromarray(drawings[original][7]).resize((28, 28)).rotate(int(angle or 0))
            assert (images[number, 7, 0].numpy() == np.array(small)).all()

    @pytest.mark.parametrize("form", ["zips", "folders"])
    def test_the_split_is_a_function_of_the_seed_and_not_of_the_form(self, made, form):
        for seed in range(3):
            one = omniglot.load(made / "npzs", num_validation=1, seed=seed)
            other = omniglot.load(made / form, num_validation=1, seed=seed)
            for part in ("train", "validation", "test"):
                assert getattr(one, part).classes == getattr(other, part).classes
                assert torch.equal(everything(getattr(one, part)), everything(getattr(other, part)))

    def test_no_validation_is_the_papers_protocol(self, made):
        splits = omniglot.load(made / "npzs", num_validation=0)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [12, 0, 2]

    @pytest.mark.parametrize("num_validation", [-1, 3])
    def test_validation_that_cannot_be(self, made, num_validation):
        with pytest.raises(ConfigurationError, match=f"num_validation = {num_validation}: must"):
            omniglot.load(made / "npzs", num_validation=num_validation)

    def test_too_few_characters(self, made):
        with pytest.raises(DataError, match="has 3 characters, of which 3 are for training"):
            omniglot.load(made / "npzs" / BACKGROUND, num_validation=1)


def flip(path, place):
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


class TestDamage:
    @pytest.mark.parametrize("form", ["zips", "npzs"])
    @pytest.mark.parametrize("harm", [cut, lambda path: flip(path, 2000)], ids=["cut", "changed"])
    def test_archives(self, made, tmp_path, form, harm):
        path = shutil.copy(next((made / form).iterdir()), tmp_path)
        harm(Path(path))
        with pytest.raises(DataError, match=r"images_.* cannot be read .*get it anew"):
            omniglot.characters(path)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.ones((4, 20, SIDE, SIDE), bool), r"shape \(4, 20, 105, 105\): must be"),
            (np.ones((3, 20, SIDE, SIDE), np.uint8), "type uint8: must be bool"),
            (np.asfortranarray(np.ones((3, 20, SIDE, SIDE), bool)), "in C order"),
            (np.array([{}]), "it holds Python's objects"),
        ],
        ids=["shape", "type", "order", "pickle"],
    )
    def test_an_npz_of_something_else(self, made, tmp_path, images, message):
        np.savez(tmp_path / "images.npz", images=images)
        with pytest.raises(DataError, match=message):
            omniglot.characters(tmp_path / "images.npz")

    def test_an_npz_without_images(self, made, tmp_path):
        np.savez(tmp_path / "images.npz", pictures=np.ones(3))
        with pytest.raises(DataError, match=r"cannot be read .*not what its name says"):
            omniglot.characters(tmp_path / "images.npz")

    @pytest.mark.parametrize("name", ["encrypted", "large", "lzma", "bz2", "sizes"])
    def test_members_that_are_not_what_they_should_be(self, made, tmp_path, name):
        """Unpacked, the large ones had 2 GB; of a size that lies no more is unpacked either."""
        methods = {"lzma": zipfile.ZIP_LZMA, "bz2": zipfile.ZIP_BZIP2}
        with zipfile.ZipFile(made / "zips" / "images_evaluation.zip") as old:
            names = [n for n in old.namelist() if "__MACOSX" not in n and n.endswith(".png")]
            pixels = old.read(names[0])
        method = methods.get(name, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(tmp_path / "evil.zip", "w", method) as new:
            for member in names:
                new.writestr(member, bytes(2**22) if name in ("large", "sizes") else pixels)
        content = bytearray((tmp_path / "evil.zip").read_bytes())
        place = content.find(b"PK\1\2")
        while name in ("encrypted", "sizes") and place >= 0:
            if name == "encrypted":
                content[place + 8] |= 1
            else:  # what is deflated to 4 kB says that it has 100 bytes
                content[place + 24 : place + 28] = (100).to_bytes(4, "little")
            place = content.find(b"PK\1\2", place + 1)
        (tmp_path / "evil.zip").write_bytes(content)
        told = {"encrypted": "is encrypted: unpack", "large": "4,194,304 bytes, where at most"}
        told |= dict.fromkeys(methods, "is neither stored nor deflated")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DataError, match=told.get(name, "cannot be read")):
            omniglot.characters(tmp_path / "evil.zip")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kB

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda path: path.write_bytes(b""), "it is empty"),
            (cut, "cannot be read"),
            (lambda path: path.unlink(), "Delta/character01 has 19 images instead of 20"),
            (lambda path: path.write_bytes(png(np.ones((9, 8), bool))), "is 8 × 9: must be 105"),
        ],
        ids=["empty", "cut", "missing", "size"],
    )
    def test_a_folder(self, made, tmp_path, harm, message):
        folder = shutil.copytree(made / "folders" / "images_evaluation", tmp_path / "copy")
        harm(sorted((folder / "Delta" / "character01").iterdir())[3])
        with pytest.raises(DataError, match=message):
            omniglot.characters(folder)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataError, match="does not exist: give"):
            omniglot.characters(tmp_path / "omniglot.zip")
        with pytest.raises(DataError, match="no images in alphabet/character/"):
            omniglot.characters(tmp_path)


class Server(ThreadingHTTPServer):
    """Serves the small archives; a test can make it serve something else."""

    def __init__(self, folder):
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.announced = {}  # sizes that are not those of the files
        self.requests = 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        content = self.server.files.get(self.path.strip("/"))
        self.send_response(404 if content is None else 200)
        size = self.server.announced.get(self.path.strip("/"), len(content or b""))
        self.send_header("Content-Length", str(size))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(made, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(made / "zips")
    checksums = {
        name.removesuffix(".zip"): "md5:" + hashlib.md5(content).hexdigest()
        for name, content in server.files.items()
    }
    order = sorted(checksums)
    monkeypatch.setattr(omniglot_archives, "CHECKSUMS", {name: checksums[name] for name in order})
    monkeypatch.setattr(omniglot_archives, "URL", f"http://127.0.0.1:{server.server_port}/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class TestDownload:
    def test_downloaded_once_and_kept_as_one_small_file(self, made, server, tmp_path):
        cache = tmp_path / "not yet" / "cache"
        first = omniglot.characters(cache=cache)
        (kept,) = cache.iterdir()
        assert kept.stat().st_size < 5 * 20 * 28 * 28 / 8 + 1000
        again = omniglot.characters(cache=cache)
        assert server.requests == 2
        expected = omniglot.characters(made / "zips")
        for data in (first, again):
            assert data.classes == expected.classes
            assert torch.equal(everything(data), everything(expected))

    def test_each_size_is_kept_apart(self, made, server, tmp_path):
        for size in (28, 15):
            omniglot.characters(cache=tmp_path, image_size=size)
            again = omniglot.characters(cache=tmp_path, image_size=size)
            expected = omniglot.characters(made / "zips", image_size=size)
            assert torch.equal(everything(again), everything(expected))

    @pytest.mark.parametrize("archive", ["images_background.zip", "images_evaluation.zip"])
    def test_an_archive_that_was_tampered_with(self, server, tmp_path, archive):
        content = bytearray(server.files[archive])
        content[500] ^= 1
        server.files[archive] = bytes(content)
        with pytest.raises(DataError, match="did not arrive as it was published"):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_an_archive_that_was_cut(self, server, tmp_path):
        server.files["images_evaluation.zip"] = server.files["images_evaluation.zip"][:-9]
        with pytest.raises(DataError, match="did not arrive as it was published"):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_connection_that_breaks(self, server, tmp_path):
        server.announced["images_evaluation.zip"] = 10**6
        with pytest.raises(DataError, match=r"cannot be downloaded \(.*or give the path"):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_an_archive_that_is_not_there(self, server, tmp_path):
        del server.files["images_background.zip"]
        with pytest.raises(DataError, match=r"cannot be downloaded .*404"):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_cache_folder_that_cannot_be_made(self, server, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"file cannot be made .*give another folder as cache"):
            omniglot.characters(cache=tmp_path / "file")

    def test_ctrl_c_leaves_nothing(self, server, tmp_path, monkeypatch):
        fetched = omniglot_archives._fetched

        def interrupted(name, folder):
            if name == "images_evaluation":
                raise KeyboardInterrupt
            return fetched(name, folder)

        monkeypatch.setattr(omniglot_archives, "_fetched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("harm", [cut, lambda path: flip(path, -1)], ids=["cut", "changed"])
    def test_a_damaged_cache_is_removed_and_then_made_anew(self, server, tmp_path, harm):
        first = omniglot.characters(cache=tmp_path)
        (kept,) = tmp_path.iterdir()
        harm(kept)
        with pytest.raises(DataError, match="was damaged and has been removed: call again"):
            omniglot.characters(cache=tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert torch.equal(everything(omniglot.characters(cache=tmp_path)), everything(first))
