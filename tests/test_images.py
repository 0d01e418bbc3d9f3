"""Images of every kind: each of Pillow's modes is read rightly or refused; all unread are named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_toys import Pairs, everything
from koi import DataError
from koi.fewshot import labelled
from koi.fewshot.images import ImageForm

GREY, COLOUR = ImageForm(None, "L"), ImageForm(None, "RGB")
SIDE = 8
RAMP = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 4  # 0 … 252, no two pixels alike


def picture(values=RAMP):
    return Image.fromarray(values.numpy().astype("uint8"))


def sixteen(values=RAMP, kind="<u2"):
    """The same picture in 16 bits, the lower ones noise, as an instrument's are."""
    noise = np.random.default_rng(0).integers(256, size=values.shape)
    return Image.fromarray((values.numpy() * 256 + noise).astype(kind))


def saved(image, path, **options):
    image.save(path, **options)
    return path


class TestModes:
    @pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"])
    def test_grey_stays_what_it_is(self, mode):
        by_way = {"RGBa": "RGBA", "PA": "P"}
        image = picture().convert(by_way.get(mode, mode)).convert(mode)
        assert torch.equal(GREY.tensor(image)[0].long(), RAMP)
        assert torch.equal(COLOUR.tensor(image).long(), RAMP.expand(3, -1, -1))

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
    def test_other_colours_are_the_same_picture(self, mode):
        """Within what their numbers, of 8 bits, can tell."""
        red, green = picture(), picture(RAMP.flip(0))
        colours = Image.merge("RGB", (red, green, picture(RAMP.T)))
        if mode == "LAB":  # Pillow makes none, but reads them
            from PIL import ImageCms

            profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            image = ImageCms.applyTransform(
                colours, ImageCms.buildTransform(*profiles, "RGB", "LAB")
            )
        else:
            image = colours.convert(mode)
        assert image.mode == mode
        for form in (GREY, COLOUR):
            expected = form.tensor(colours).float()
            actual = form.tensor(image).float()
            assert (actual - expected).abs().mean() < 2
            assert (actual - expected).abs().max() < 20  # of what Lab has, 16

    def test_one_bit(self):
        bits = RAMP > 100
        image = Image.fromarray(bits.numpy())
        assert image.mode == "1"
        assert torch.equal(GREY.tensor(image)[0], bits.to(torch.uint8) * 255)

    @pytest.mark.parametrize(
        ("kind", "name"),
        [("<u2", "grey.png"), ("<u2", "grey.tif"), (">u2", "grey.tif"), ("<u2", "grey.pgm")],
    )
    def test_grey_of_sixteen_bits_is_read_by_the_upper_eight(self, tmp_path, kind, name):
        path = saved(sixteen(kind=kind), tmp_path / name)
        assert torch.equal(GREY.read(path)[0].long(), RAMP)
        assert torch.equal(COLOUR.read(path)[1].long(), RAMP)

    def test_what_is_transparent_in_sixteen_bits_is_white(self, tmp_path):
        image = Image.fromarray((RAMP * 256).numpy().astype("uint16"))
        path = saved(image, tmp_path / "grey.png", transparency=40 * 256)
        expected = RAMP.where(RAMP != 40, 255)
        assert torch.equal(GREY.read(path)[0].long(), expected)

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("float32", r"0\.tif is of floating-point numbers \(mode F\), of which nothing says"),
            ("int32", r"0\.tif is of 32-bit numbers \(mode I\).*: scale it to 8 or 16 bits, or gi"),
            ("int16", r"0\.tif is of 32-bit numbers"),  # as Pillow reads signed ones
        ],
    )
    def test_numbers_without_black_and_white_are_refused(self, tmp_path, kind, said):
        for name in "ab":
            (tmp_path / name).mkdir()
            saved(Image.fromarray(RAMP.numpy().astype(kind)), tmp_path / name / "0.tif")
        for max_bytes in (10**9, 1):
            with pytest.raises(DataError, match=said) as caught:
                labelled(tmp_path, max_bytes=max_bytes)
            assert len(str(caught.value).splitlines()) == 2

    def test_images_of_a_dataset_are_named_by_their_number(self):
        float_image = Image.fromarray(RAMP.numpy().astype("float32"))
        with pytest.raises(DataError, match="the image of example 1 is of floating-point numbers"):
            labelled(Pairs([picture(), float_image], ["a", "b"]))
        with pytest.raises(DataError, match="example 1 is of mode La, which cannot be made grey"):
            labelled(Pairs([picture(), picture().convert("LA").convert("La")], ["a", "b"]))
        data = labelled(Pairs([picture(), sixteen()], ["a", "b"]), mode="L")
        first, second = everything(data).values()
        assert torch.equal(first, second)


class TestTurned:
    # How a camera that was held so stores the picture, by EXIF's number: row and column of what is
    # seen at the top left, as the standard has it.
    STORED = {  # noqa: RUF012
        1: lambda seen: seen,
        2: lambda seen: seen.flip(1),
        3: lambda seen: seen.flip(0, 1),
        4: lambda seen: seen.flip(0),
        5: lambda seen: seen.T,
        6: lambda seen: seen.rot90(1),
        7: lambda seen: seen.flip(0, 1).T,
        8: lambda seen: seen.rot90(-1),
    }

    @pytest.mark.parametrize("number", STORED)
    def test_a_photo_is_seen_as_it_was_taken(self, tmp_path, number):
        seen = RAMP[:5]  # neither square nor symmetric
        exif = Image.Exif()
        exif[0x0112] = number
        path = saved(picture(self.STORED[number](seen).contiguous()), tmp_path / "0.png", exif=exif)
        assert torch.equal(GREY.read(path)[0].long(), seen)
        with Image.open(path) as image:
            assert torch.equal(GREY.tensor(image)[0].long(), seen)
        resized = ImageForm((3, 4), "L").read(path)
        assert torch.equal(resized, ImageForm((3, 4), "L").tensor(picture(seen)))

    @pytest.mark.parametrize("note", [b"Exif\0\0nonsense", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
    def test_a_note_that_cannot_be_read_is_none(self, note):
        content = io.BytesIO()
        picture().save(content, "PNG", exif=note)
        with Image.open(content) as image:
            assert torch.equal(GREY.tensor(image)[0].long(), RAMP)


class TestUnread:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two classes of six images, of which four cannot be read, the first among them."""
        for name in "ab":
            (tmp_path / name).mkdir()
            for number in range(6):
                saved(picture(), tmp_path / name / f"{number}.png")
        (tmp_path / "a" / "0.png").write_bytes(b"")
        (tmp_path / "a" / "3.png").write_text("no image")
        Image.fromarray(RAMP.numpy().astype("float32")).save(tmp_path / "b" / "7.tif")
        cut = tmp_path / "b" / "2.png"
        cut.write_bytes(cut.read_bytes()[:-30])
        return tmp_path

    def test_all_are_named_at_once(self, folder):
        with pytest.raises(DataError) as caught:
            labelled(folder)
        lines = str(caught.value).splitlines()
        assert [line.split(" cannot be read")[0].split(" is of")[0] for line in lines] == [
            f"the image {folder / name}" for name in ("a/0.png", "a/3.png", "b/2.png", "b/7.tif")
        ]
        assert all(": replace or remove it" in line for line in lines[:3])

    def test_of_what_is_loaded_when_used_those_whose_beginning_tells(self, folder):
        with pytest.raises(DataError) as caught:
            labelled(folder, max_bytes=1)
        assert len(str(caught.value).splitlines()) == 3
        for name in ("a/0.png", "a/3.png", "b/7.tif"):
            (folder / name).unlink()
        data = labelled(folder, max_bytes=1)
        with pytest.raises(DataError, match=r"2\.png cannot be read"):
            everything(data)

    def test_nothing_that_can_be_read(self, tmp_path):
        for name in "ab":
            (tmp_path / name).mkdir()
            for number in range(60):
                (tmp_path / name / f"{number:02}.png").write_bytes(b"")
        with pytest.raises(DataError) as caught:
            labelled(tmp_path)
        lines = str(caught.value).splitlines()
        assert (len(lines), lines[-1]) == (101, "and 20 more")
