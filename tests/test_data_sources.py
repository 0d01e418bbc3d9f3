"""Where labelled data come from: tensors, datasets, columns, folders of images; what cannot be."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_toys import Pairs, assert_same, everything
from koi import ConfigurationError, DataError
from koi.fewshot import LabelledData, labelled
from koi.lab.cli.classifier import _files


class Columns:
    """What Koi uses of a Hugging Face dataset."""

    def __init__(self, names=None, **columns):
        self.columns = columns
        self.column_names = list(columns)
        self.features = {name: Feature(names if name == "label" else None) for name in columns}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


class Feature:
    def __init__(self, names):
        if names is not None:
            self.names = names


class TestSources:
    def test_labelled_data_come_back_as_they_are(self):
        data = LabelledData(torch.arange(2), ["a", "b"], [1, 1])
        assert labelled(data) is data

    def test_arrays_and_names_as_labels(self):
        data = labelled((np.arange(4.0), ["dog", "cat", "dog", "cow"]))
        assert data.classes == ("cat", "cow", "dog")
        assert everything(data)["dog"].tolist() == [0, 2]

    @pytest.mark.parametrize(
        "labels",
        [[torch.tensor(1), torch.tensor(0)], [np.int64(1), np.int64(0)], [1.0, 0.0], [True, False]],
        ids=["tensors", "NumPy", "floats", "bool"],
    )
    def test_labels_of_every_kind(self, labels):
        data = labelled(Pairs(torch.arange(2), labels))
        assert_same(everything(data), {"0": torch.tensor([1]), "1": torch.tensor([0])})

    def test_a_dataset_of_two_examples_is_no_pair_of_tensors(self):
        data = labelled([(torch.zeros(3), 0), (torch.ones(3), 1)])
        assert everything(data)["1"].tolist() == [[1, 1, 1]]

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ((torch.zeros(4), torch.zeros(3)), "4 inputs and 3 labels"),
            ((torch.zeros(2), torch.tensor([0.0, float("nan")])), "example 1 is nan"),
            ((torch.zeros(2), torch.tensor([0.0, 0.5])), "example 1 is 0.5"),
            ((torch.zeros(2), [0, None]), "example 1 is None"),
            ((torch.zeros(3), torch.ones(3)), "all 3 examples are of one class, '1'"),
            ((torch.zeros(2), [1, "1"]), "two classes are named '1'"),
            ((torch.zeros(0), []), "no examples"),
            (Pairs([], []), "Pairs is empty"),
            (Pairs([torch.zeros(2), torch.zeros(3)], [0, 1]), r"example 1 has shape \(3,\)"),
            (Pairs([[1, 2], [0.5, 2]], [0, 1]), "example 1 is of type torch.float32 and the firs"),
            (Pairs(["some", "text"], [0, 1]), "example 0 is of type str.* turn text into tokens"),
            ([torch.zeros(2), torch.zeros(2), torch.zeros(2)], "must be a pair"),
            (Columns(image=[1, 2], label=[0, -1], names=["a", "b"]), "without a label"),
            (Columns(image=[], label=[]), "Columns is empty"),
        ],
    )
    def test_data_that_do_not_fit(self, source, message):
        with pytest.raises(DataError, match=message):
            labelled(source)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"source": 3}, "source of type int: must be a pair"),
            ({"source": {"train": Pairs([0], [0])}}, "source of type dict: must be a pair"),
            ({"image_size": 0}, "image_size = 0: must be"),
            ({"image_size": (3, 4, 5)}, "image_size"),
            ({"mode": "RBG"}, "must be one of 'L', 'RGB'; did you mean \"RGB\""),
            ({"source": Columns(label=[0], x=[0])}, "give input_column, of 'label', 'x'"),
            ({"source": Columns(x=[0]), "label_column": "y"}, "label_column = 'y'.*one of 'x'"),
        ],
    )
    def test_options_that_cannot_work(self, options, message):
        options = {"source": (torch.zeros(2), [0, 1]), **options}
        with pytest.raises(ConfigurationError, match=message):
            labelled(**options)

    def test_a_ragged_example_of_lazy_data_is_named_when_it_is_used(self):
        data = labelled(Pairs([torch.zeros(2), torch.zeros(3)], [0, 1]), max_bytes=1)
        with pytest.raises(DataError, match=r"example 1 has shape \(3,\)"):
            data.take(torch.tensor([1]), torch.tensor([0]))


class TestColumns:
    @pytest.mark.parametrize("max_bytes", [10**9, 1])
    def test_images_with_named_labels(self, max_bytes):
        images = [Image.new("RGB", (4, 3), (value, 0, 255)) for value in (0, 51, 255)]
        source = Columns(
            idx=[7, 8, 9], image=images, label=[2, 0, 2], names=["fox", "never seen", "bee"]
        )
        data = labelled(source, max_bytes=max_bytes)
        assert data.classes == ("fox", "bee")
        bee = everything(data)["bee"]
        assert bee.shape == (2, 3, 3, 4)
        torch.testing.assert_close(bee[:, :, 1, 2], torch.tensor([[0, 0, 1.0], [1, 0, 1]]))

    def test_columns_by_name(self):
        source = Columns(label=[0, 1], text=[[1, 2], [3, 4]], intent=["pay", "ask"])
        data = labelled(source, input_column="text", label_column="intent")
        assert_same(
            everything(data), {"ask": torch.tensor([[3, 4]]), "pay": torch.tensor([[1, 2]])}
        )


def draw_images(root, classes, sizes=((6, 5),), mode="L"):
    """Write a few images of noise for each class, and return them."""
    written = {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(3):
            width, height = sizes[number % len(sizes)]
            noise = torch.randint(256, (height, width), dtype=torch.uint8)
            image = Image.frombytes("L", (width, height), bytes(noise.flatten().tolist()))
            image.convert(mode).save(root / name / f"{number}.png")
            written.setdefault(name, []).append(noise)
    return written


class TestFolder:
    @pytest.mark.parametrize("max_bytes", [10**9, 1])
    def test_class_folders_nested_or_not(self, tmp_path, max_bytes):
        written = draw_images(tmp_path, ["b", "a/two", "a/one"])
        (tmp_path / "b" / "notes.txt").write_text("no image")
        (tmp_path / ".hidden").mkdir()
        data = labelled(tmp_path, mode="L", max_bytes=max_bytes)
        assert data.classes == ("a/one", "a/two", "b")
        for name, images in everything(data).items():
            expected = torch.stack(written[name]).unsqueeze(1) / 255
            torch.testing.assert_close(images, expected)

    def test_images_of_many_sizes_are_resized_as_pillow_does_it(self, tmp_path):
        written = draw_images(tmp_path, ["a", "b"], sizes=[(6, 5), (9, 9)])
        data = labelled(str(tmp_path), image_size=(4, 3), mode="L")
        noise = Image.fromarray(written["a"][1].numpy()).resize((3, 4), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(noise)) / 255
        torch.testing.assert_close(everything(data)["a"][1, 0], expected)

    def test_grey_images_in_colour(self, tmp_path):
        draw_images(tmp_path, ["a", "b"])
        data = labelled(tmp_path)
        red, green, blue = everything(data)["a"].unbind(1)
        assert torch.equal(red, green)
        assert torch.equal(red, blue)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_what_is_transparent_is_white_and_not_the_black_beneath(self, tmp_path, mode):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 255))
        for name in "ab":
            (tmp_path / name).mkdir()
            image.convert(mode).save(tmp_path / name / "0.png")
        assert everything(labelled(tmp_path, mode="L"))["a"].tolist() == [[[[1, 0]]]]

    def test_an_image_far_too_large_is_named(self, tmp_path):
        draw_images(tmp_path, ["a", "b"])
        with pytest.raises(DataError, match=r"0\.png has .* pixels, and at most 4 are read"):
            labelled(tmp_path, max_pixels=4)

    def test_images_that_differ_in_size(self, tmp_path):
        draw_images(tmp_path, ["a", "b"], sizes=[(6, 5), (9, 9)])
        with pytest.raises(DataError, match=r"1.png is 9 × 9 and .*0.png is 6 × 5: give image_si"):
            labelled(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="is no folder"):
            labelled(tmp_path / "nowhere")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(DataError, match="has no folders with images"):
            labelled(tmp_path)

    def test_a_class_without_images(self, tmp_path):
        draw_images(tmp_path, ["a", "b"])
        (tmp_path / "c").mkdir()
        with pytest.raises(DataError, match=r"class folder .*c has no images"):
            labelled(tmp_path)

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path, monkeypatch):
        """It would be a class less, without a word."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.new("L", (2, 2)).save(tmp_path / name / "1.png")
        original = os.scandir

        def scandir(path):
            if str(path).endswith("b"):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=r"b cannot be read \(Permission denied\): make it"):
            labelled(tmp_path)
        with pytest.raises(DataError, match="b cannot be read"):
            list(_files(tmp_path))

    def test_images_beside_the_class_folders(self, tmp_path):
        draw_images(tmp_path, ["a", "b"])
        (tmp_path / "a" / "0.png").rename(tmp_path / "0.png")
        with pytest.raises(DataError, match="lies beside the class folders"):
            labelled(tmp_path)

    def test_links_are_followed(self, tmp_path):
        draw_images(tmp_path / "pool", ["a", "b", "c"])
        (tmp_path / "chosen").mkdir()
        for name in "ac":
            (tmp_path / "chosen" / name).symlink_to(tmp_path / "pool" / name)
        assert labelled(tmp_path / "chosen").classes == ("a", "c")

    @pytest.mark.parametrize("to", [".", "b", "b/deep"])
    def test_links_in_a_circle(self, to, tmp_path):
        draw_images(tmp_path, ["a", "b/deep"])
        (tmp_path / "b" / "deep" / "again").symlink_to(tmp_path / to)
        match = rf"b/deep/again is the folder {tmp_path / to} once more, by a link: remove the link"
        with pytest.raises(DataError, match=match):
            labelled(tmp_path)

    @pytest.mark.parametrize("link", ["0", "z"])
    def test_two_classes_of_the_same_images(self, link, tmp_path):
        """Whichever is met first."""
        draw_images(tmp_path, ["a", "b"])
        (tmp_path / link).symlink_to(tmp_path / "b")
        with pytest.raises(DataError, match="once more, by a link"):
            labelled(tmp_path)

    def test_one_class(self, tmp_path):
        draw_images(tmp_path, ["only"])
        with pytest.raises(DataError, match="of one class, 'only'"):
            labelled(tmp_path)

    @pytest.mark.parametrize("max_bytes", [10**9, 1])
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda content: b"", "is empty"),
            (lambda content: content[: len(content) // 2], ""),
            (lambda content: b"no image at all", "no image that is known"),
        ],
        ids=["empty", "cut", "something else"],
    )
    def test_a_damaged_image_is_named(self, tmp_path, damage, message, max_bytes):
        draw_images(tmp_path, ["a", "b"], sizes=[(60, 50)])
        path = tmp_path / "b" / "1.png"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(DataError, match=rf"1\.png cannot be read \(.*{message}"):
            everything(labelled(tmp_path, max_bytes=max_bytes))

    def test_without_pillow(self, tmp_path, monkeypatch):
        draw_images(tmp_path, ["a", "b"])
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(DataError, match=r'need PIL.*pip install "koi-x\[data\]"'):
            labelled(tmp_path)
