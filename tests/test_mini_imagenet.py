"""mini-ImageNet in every form in which it is read; what is missing; what becomes of pickles."""

import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_toys import everything
from koi import DataError, KoiWarning
from koi.problems import mini_imagenet

CLASSES = {"train": ["n01", "n02", "n03"], "val": ["n04", "n05"], "test": ["n06", "n07"]}
NUM_IMAGES = 4


@pytest.fixture(scope="module")
def images():
    """By class, images of noise: some of 84 × 84, others of the size of a photograph."""
    random = np.random.default_rng(0)
    sizes = [(84, 84), (84, 84), (120, 97), (84, 84)]
    return {
        name: [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        for names in CLASSES.values()
        for name in names
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, images):
    """Return a folder with the layout of Ravi and Larochelle."""
    root = tmp_path_factory.mktemp("mini-imagenet")
    (root / "images").mkdir()
    for part, names in CLASSES.items():
        lines = ["filename,label"]
        for name in reversed(names):
            for number, image in enumerate(images[name]):
                Image.fromarray(image).save(root / "images" / f"{name}_{number}.png")
                lines.append(f"{name}_{number}.png,{name}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def listed(made, tmp_path):
    """A copy of it, to do harm to."""
    return shutil.copytree(made, tmp_path / "copy")


def in_folders(root, folder):
    """Lay the images out as the paper's code has them: part, class, image."""
    for part, names in CLASSES.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for path in (root / "images").glob(f"{name}_*"):
                shutil.copy(path, folder / part / name)


def assert_all_there(splits, images):
    for part, names in CLASSES.items():
        found = everything(getattr(splits, "validation" if part == "val" else part))
        assert list(found) == names
        for name in names:
            for image, array in zip(found[name], images[name], strict=True):
                expected = Image.fromarray(array).resize((84, 84), Image.Resampling.NEAREST)
                exact = torch.from_numpy(np.array(expected)) / 255
                assert torch.equal(image.permute(1, 2, 0), exact)


class TestFiles:
    def test_lists(self, made, images):
        assert_all_there(mini_imagenet.load(made), images)

    def test_lists_with_images_in_class_folders(self, listed, images):
        for path in list((listed / "images").iterdir()):
            folder = path.with_name(path.name.partition("_")[0])
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
        assert_all_there(mini_imagenet.load(str(listed)), images)

    @pytest.mark.parametrize("name", ["val", "validation"])
    def test_folders_as_the_papers_code_has_them(self, made, tmp_path, images, name):
        in_folders(made, tmp_path)
        (tmp_path / "val").rename(tmp_path / name)
        assert_all_there(mini_imagenet.load(tmp_path), images)

    def test_photographs_in_jpeg(self, listed, images):
        for path in (listed / "images").iterdir():
            Image.open(path).save(path, "jpeg", quality=95)
        found = everything(mini_imagenet.load(listed).train)["n01"][0]
        exact = torch.from_numpy(images["n01"][0]).permute(2, 0, 1) / 255
        assert (found - exact).abs().mean() < 0.2  # noise is what JPEG keeps worst

    def test_no_form(self, tmp_path):
        with pytest.raises(DataError, match="is no folder"):
            mini_imagenet.load(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"has no mini-ImageNet: it needs train\.csv"):
            mini_imagenet.load(tmp_path)

    def test_a_part_that_is_missing(self, listed):
        (listed / "val.csv").unlink()
        with pytest.raises(DataError, match="has no mini-ImageNet"):
            mini_imagenet.load(listed)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is no list"),
            ("filename,label\n", "is no list"),
            ("file,class\na.jpg,n01\n", "must have columns filename and label"),
            ("filename,label\nn06_0.png,n06\nn06_1", "cut or damaged at line 3"),
            ("filename,label\nn06_0.png,n06\nn06_0.png,n06\n", "names an image of n06 twice"),
            ("filename,label\nn01_0.png,n01\n", "the class 'n01' is in two parts"),
        ],
    )
    def test_lists_that_are_wrong(self, listed, content, message):
        (listed / "test.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            mini_imagenet.load(listed)

    def test_lists_as_a_spreadsheet_writes_them(self, listed, images):
        """With a byte order mark, and lines that end in two characters."""
        for part in CLASSES:
            text = (listed / f"{part}.csv").read_text().replace("\n", "\r\n")
            (listed / f"{part}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert_all_there(mini_imagenet.load(listed), images)

    @pytest.mark.parametrize("content", ["filename,label\n\xe9.png,n06\n".encode("latin-1"), b"\0"])
    def test_lists_that_are_not_in_utf_8(self, listed, content):
        (listed / "test.csv").write_bytes(content)
        with pytest.raises(DataError, match=r"test\.csv (cannot be read .*in UTF-8|is no list)"):
            mini_imagenet.load(listed)


class TestMissingImages:
    @pytest.fixture
    def harmed(self, listed):
        """Two images are missing, one is empty."""
        images = listed / "images"
        (images / "n01_0.png").unlink()
        (images / "n06_3.png").unlink()
        (images / "n02_1.png").write_bytes(b"")
        return listed

    def test_they_are_counted_and_named(self, harmed):
        message = r"2 missing and 1 empty of 28 images \(\S*n01_0.png, \S*n06_3.png, \S*n02_1.png\)"
        with pytest.raises(DataError, match=message + ": get them anew, or say skip_missing=True"):
            mini_imagenet.load(harmed)

    def test_the_first_few_of_many_are_named(self, harmed):
        for path in (harmed / "images").iterdir():
            path.write_bytes(b"")
        with pytest.raises(DataError, match=r"2 missing and 26 empty of 28 .*n01_1\.png, …\)"):
            mini_imagenet.load(harmed)

    def test_they_can_be_left_out(self, harmed, images):
        (harmed / "images" / "n07_0.png").write_bytes(b"no image")
        message = r"2 missing and 1 empty and 1 damaged of 28 images .*, and left out"
        with pytest.warns(KoiWarning, match=message) as caught:
            splits = mini_imagenet.load(harmed, skip_missing=True)
        assert caught[0].filename == __file__
        assert splits.train.counts == [3, 3, 4]
        assert splits.test.counts == [3, 3]
        left = everything(splits.train)["n02"]
        for image, number in zip(left, (0, 2, 3), strict=True):
            exact = Image.fromarray(images["n02"][number]).resize((84, 84), 0)
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(exact)) / 255)

    def test_a_damaged_one_is_an_error(self, listed):
        path = listed / "images" / "n04_2.png"
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(DataError, match=r"1 damaged of 28 images \(.*n04_2\.png\)"):
            mini_imagenet.load(listed)

    def test_a_class_of_which_nothing_is_left(self, listed):
        for path in (listed / "images").glob("n05_*"):
            path.write_bytes(b"")
        with pytest.raises(DataError, match="all 4 images of n05 are missing, empty or damaged"):
            mini_imagenet.load(listed, skip_missing=True)

    def test_nothing_is_said_where_nothing_is_missing(self, made, images):
        assert_all_there(mini_imagenet.load(made, skip_missing=True), images)


def arrays(part, images):
    """Return the images of a part, those of its classes mixed, and the class of each."""
    small = [
        np.array(Image.fromarray(image).resize((84, 84), Image.Resampling.NEAREST))
        for number in range(NUM_IMAGES)
        for image in (images[name][number] for name in CLASSES[part])
    ]
    return np.stack(small), np.array(CLASSES[part] * NUM_IMAGES)


class TestArrays:
    @pytest.mark.parametrize("names", [("images", "labels"), ("features", "targets")])
    def test_npz(self, tmp_path, images, names):
        for part in CLASSES:
            content = dict(zip(names, arrays(part, images), strict=True))
            np.savez(tmp_path / f"few-shot-{part}.npz", **content)
        assert_all_there(mini_imagenet.load(tmp_path), images)

    def test_classes_that_are_numbers_belong_to_their_part(self, tmp_path, images):
        """Each part may count from 0: class 0 of one is not class 0 of another."""
        for part in CLASSES:
            content, _ = arrays(part, images)
            labels = np.where(np.arange(len(content)) % 2, 10, 9)
            np.savez(tmp_path / f"{part}.npz", images=content, labels=labels)
        splits = mini_imagenet.load(tmp_path)
        assert splits.train.classes == ("train/9", "train/10")
        assert splits.validation.classes == ("validation/9", "validation/10")
        assert splits.test.counts == [4, 4]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": np.zeros((8, 84, 84, 3))}, "has no images of shape"),
            ({"images": np.zeros((8, 3, 84, 84), np.uint8)}, "has no images of shape"),
            ({"images": np.zeros((0, 84, 84, 3), np.uint8)}, "has no images of shape"),
            (
                {"labels": np.zeros(7)},
                r"8 images and labels of shape \(7,\): it needs one for each",
            ),
            ({"labels": np.zeros((8, 1))}, r"8 images and labels of shape \(8, 1\)"),
            ({"labels": np.array([None] * 8)}, r"test\.npz cannot be read \(it holds Python's"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, images, change, message):
        for part in CLASSES:
            content = dict(zip(("images", "labels"), arrays(part, images), strict=True))
            np.savez(tmp_path / f"{part}.npz", **content | (change if part == "test" else {}))
        with pytest.raises(DataError, match=message):
            mini_imagenet.load(tmp_path)

    def test_arrays_that_are_missing(self, tmp_path, images):
        content, labels = arrays("test", images)
        for name, given in {
            "has no images": {"labels": labels},
            "one for": {"data": content},
        }.items():
            for part in CLASSES:
                np.savez(tmp_path / f"{part}.npz", **given)
            with pytest.raises(DataError, match=name):
                mini_imagenet.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\3\4 cut"])
    def test_files_of_something_else(self, tmp_path, content):
        for part in CLASSES:
            (tmp_path / f"{part}.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.npz cannot be read \(.*get it anew"):
            mini_imagenet.load(tmp_path)

    def test_other_arrays_are_not_unpacked(self, tmp_path, images, monkeypatch):
        for part in CLASSES:
            content = dict(zip(("images", "labels"), arrays(part, images), strict=True))
            np.savez_compressed(tmp_path / f"{part}.npz", **content, more=np.zeros(2**20))
        really, names = zipfile.ZipFile.open, set()

        def opened(archive, info, *more):
            names.add(info.filename)
            return really(archive, info, *more)

        monkeypatch.setattr(zipfile.ZipFile, "open", opened)
        assert_all_there(mini_imagenet.load(tmp_path), images)
        assert names == {"images.npy", "labels.npy"}

    def test_arrays_larger_than_the_whole_are_not_made(self, tmp_path, images):
        for part in CLASSES:
            content = dict(zip(("images", "labels"), arrays(part, images), strict=True))
            np.savez(tmp_path / f"{part}.npz", **content)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 84, 84, 3)}
        )
        labels = io.BytesIO()
        np.save(labels, np.zeros(8))
        with zipfile.ZipFile(tmp_path / "test.npz", "w") as archive:
            archive.writestr("images.npy", header.getvalue())
            archive.writestr("labels.npy", labels.getvalue())
        with pytest.raises(DataError, match=r"images\.npy in .* has shape \(1099511627776"):
            mini_imagenet.load(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", b"{" * 9999],
        ids=["cut", "of 4 GB", "none"],
    )
    def test_evil_headers(self, tmp_path, images, header):
        for part in CLASSES:
            with zipfile.ZipFile(tmp_path / f"{part}.npz", "w") as archive:
                archive.writestr("images.npy", header)
        with pytest.raises(DataError, match=r"train\.npz cannot be read \(its header is none"):
            mini_imagenet.load(tmp_path)

    def test_two_files_for_one_part(self, tmp_path):
        for name in ("a-train.npz", "b_train.npz", "val.npz", "test.npz"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=r"a-train\.npz and b_train\.npz .* could both be"):
            mini_imagenet.load(tmp_path)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_become_arrays_as_the_documentation_says(tmp_path, images, protocol, monkeypatch):
    """They are not read by Koi, which says where those lines are."""
    for part in CLASSES:
        content, labels = arrays(part, images)
        rows = {name: np.flatnonzero(labels == name).tolist() for name in CLASSES[part]}
        content = {"image_data": content, "class_dict": rows}
        path = tmp_path / f"mini-imagenet-cache-{part}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=r"cache-test\.pkl is a pickle, .*lines that docs/data\.md"):
        mini_imagenet.load(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "data.md"
    (lines,) = re.findall(r"```python\n([^`]*pickle[^`]*)```", page.read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    exec(lines)
    assert_all_there(mini_imagenet.load(tmp_path), images)
