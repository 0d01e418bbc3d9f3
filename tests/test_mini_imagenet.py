"""mini-ImageNet in every form in which it circulates; what is missing; pickles that do harm."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

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


def everything(data):
    """Return all inputs of each class, by its name."""
    return {
        name: data.take(torch.full((count,), number), torch.arange(count))
        for number, (name, count) in enumerate(zip(data.classes, data.counts, strict=True))
    }


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
        with pytest.raises(DataError, match=r"n04_2\.png cannot be read"):
            mini_imagenet.load(listed)

    def test_a_class_of_which_nothing_is_left(self, listed):
        for path in (listed / "images").glob("n05_*"):
            path.write_bytes(b"")
        with pytest.raises(DataError, match="all 4 images of n05 are missing, empty or damaged"):
            mini_imagenet.load(listed, skip_missing=True)

    def test_nothing_is_said_where_nothing_is_missing(self, made, images):
        assert_all_there(mini_imagenet.load(made, skip_missing=True), images)


def arrays(part, images):
    """Return a part as the pickles have it, the classes' images mixed."""
    small = [
        np.array(Image.fromarray(image).resize((84, 84), Image.Resampling.NEAREST))
        for number in range(NUM_IMAGES)
        for image in (images[name][number] for name in CLASSES[part])
    ]
    labels = [name for _ in range(NUM_IMAGES) for name in CLASSES[part]]
    rows = {name: [k for k, label in enumerate(labels) if label == name] for name in CLASSES[part]}
    return {"image_data": np.stack(small), "class_dict": rows}


class PythonTwo(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, which had one type for both."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value if isinstance(value, bytes) else value.encode("ascii")
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


class TestArrays:
    @pytest.mark.parametrize("rows_as", [list, np.array, tuple])
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_pickles(self, tmp_path, images, protocol, rows_as):
        for part in CLASSES:
            content = arrays(part, images)
            for name, rows in content["class_dict"].items():
                content["class_dict"][name] = rows_as([np.int64(row) for row in rows])
            content["image_data"] = np.asfortranarray(content["image_data"])
            content = pickle.dumps(content, protocol)
            (tmp_path / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)
        assert_all_there(mini_imagenet.load(tmp_path), images)

    def test_pickles_of_python_2(self, tmp_path, images):
        for part in CLASSES:
            with (tmp_path / f"{part}.pickle").open("wb") as file:
                PythonTwo(file, protocol=2).dump(arrays(part, images))
        assert_all_there(mini_imagenet.load(tmp_path), images)

    def test_npz_with_labels(self, tmp_path, images):
        for part in CLASSES:
            content = arrays(part, images)
            labels = np.array(CLASSES[part] * NUM_IMAGES)
            path = tmp_path / f"few-shot-{part}.npz"
            np.savez(path, features=content["image_data"], targets=labels)
        assert_all_there(mini_imagenet.load(tmp_path), images)

    def test_classes_that_are_numbers_belong_to_their_part(self, tmp_path, images):
        """Each part may count from 0: class 0 of one is not class 0 of another."""
        for part in CLASSES:
            content = arrays(part, images)
            labels = np.arange(len(content["image_data"])) % 2
            np.savez(tmp_path / f"{part}.npz", images=content["image_data"], labels=labels)
        splits = mini_imagenet.load(tmp_path)
        assert splits.train.classes == ("train/0", "train/1")
        assert splits.validation.classes == ("validation/0", "validation/1")
        assert splits.test.counts == [4, 4]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_data": np.zeros((8, 84, 84, 3))}, "has no images of shape"),
            ({"image_data": np.zeros((8, 3, 84, 84), np.uint8)}, "has no images of shape"),
            ({"image_data": [1, 2]}, "has no images of shape"),
            ({"class_dict": {"n06": [0, 8]}}, "name an image twice, or one it has not"),
            ({"class_dict": {"n06": [0, -1]}}, "name an image twice, or one it has not"),
            ({"class_dict": {"n06": [0, 1], "n07": [1]}}, "name an image twice"),
            ({"class_dict": {"n06": [0], "n07": []}}, "has no images of n07"),
            ({"class_dict": {}}, "has no images of any class"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, images, change, message):
        for part in CLASSES:
            content = arrays(part, images) | (change if part == "test" else {})
            (tmp_path / f"{part}.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            mini_imagenet.load(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (pickle.dumps([1, 2]), "holds a list: must be a dictionary"),
            (pickle.dumps({"image_data": np.zeros((1, 84, 84, 3), np.uint8)}), "neither class_d"),
            (pickle.dumps({"data": np.zeros(300)})[:-50], r"cannot be read \(.*get it anew"),
            (b"", r"cannot be read \(.*get it anew"),
            (b"no pickle", r"cannot be read \(.*get it anew"),
        ],
        ids=["list", "no classes", "cut", "empty", "something else"],
    )
    def test_pickles_of_something_else(self, tmp_path, images, content, message):
        for part in CLASSES:
            (tmp_path / f"{part}.pkl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            mini_imagenet.load(tmp_path)

    def test_two_files_for_one_part(self, tmp_path):
        for name in ("a-train.npz", "b_train.pkl", "val.pkl", "test.pkl"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=r"a-train\.npz and b_train\.pkl .* could both be"):
            mini_imagenet.load(tmp_path)


class Harm:
    """A pickle of this calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestPicklesThatDoHarm:
    @pytest.mark.parametrize("hidden", ["plain", "in a list", "in an array"])
    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_they_are_refused_and_do_none(self, tmp_path, images, hidden, protocol):
        done = tmp_path / "done"
        harm = Harm(exec, f"open({str(done)!r}, 'w').close()")
        value = {
            "plain": harm,
            "in a list": [1, harm],
            "in an array": np.array([harm, 1], dtype=object),
        }[hidden]
        content = pickle.dumps(arrays("train", images) | {"extra": value}, protocol)
        for part in CLASSES:
            (tmp_path / f"{part}.pkl").write_bytes(content)
        with pytest.raises(DataError, match=r"asks for (\w+\.exec|an array of type O8),.* refused"):
            mini_imagenet.load(tmp_path)
        assert not done.exists()
        pickle.loads(content)  # what an ordinary reader does
        assert done.exists()

    def test_a_forged_type_is_refused(self, tmp_path):
        """NumPy itself would read a pointer from the file, and follow it."""
        objects = (3, "|", None, ("a",), {"a": (np.dtype("u1"), 1000)}, 8, 1, 0)
        for part in CLASSES:
            with (tmp_path / f"{part}.pkl").open("wb") as file:
                pickle.dump({"data": Harm(np.dtype, "V8", False, True), "state": objects}, file)
        with pytest.raises(DataError, match="asks for an array of type V8, which is refused"):
            mini_imagenet.load(tmp_path)

    def test_an_npz_of_pickles_is_refused(self, tmp_path):
        for part in CLASSES:
            np.savez(tmp_path / f"{part}.npz", images=np.array([Harm(print, "harm")], dtype=object))
        with pytest.raises(DataError, match="Object arrays cannot be loaded"):
            mini_imagenet.load(tmp_path)
