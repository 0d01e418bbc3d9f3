"""Folders of drawn shapes, and a run that was trained and adapted on some, as a user does it."""

import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

from koi.lab.cli import main

SIDE = 40


def shape(name, jitter):
    """Draw a shape in black on white, never twice alike."""
    image = Image.new("L", (SIDE, SIDE), 255)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (at + jitter.randint(-3, 3) for at in (7, 7, SIDE - 7, SIDE - 7))
    middle = (left + right) // 2, (top + bottom) // 2
    across, down = [left, middle[1], right, middle[1]], [middle[0], top, middle[0], bottom]
    lines = {
        "cross": [across, down],
        "dash": [across],
        "bar": [down],
        "slope": [[left, bottom, right, top]],
        "fall": [[left, top, right, bottom]],
        "saltire": [[left, top, right, bottom], [left, bottom, right, top]],
        "roof": [[left, bottom, middle[0], top, right, bottom]],
        "cup": [[left, top, middle[0], bottom, right, top]],
    }
    for line in lines.get(name, []):
        draw.line(line, fill=0, width=4)
    if name == "ring":
        draw.ellipse([left, top, right, bottom], outline=0, width=4)
    if name == "disc":
        draw.ellipse([left, top, right, bottom], fill=0)
    if name == "frame":
        draw.rectangle([left, top, right, bottom], outline=0, width=4)
    return image


def draw_folder(root, names, count, seed=0):
    """Write so many images of each shape, in a folder for each."""
    jitter = random.Random(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            shape(name, jitter).save(root / name / f"{number}.png")
    return root


TRAINED = ("cross", "dash", "slope", "fall", "saltire", "roof", "cup", "frame")
NEW = ("bar", "disc", "ring")


def exit_code(*arguments):
    """Run the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["koi", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    return left.value.code


class Own(NamedTuple):
    """A folder with images to learn from, to adapt to and to predict; and what was made of them."""

    place: Path
    run: Path
    classifier: Path


def made(place):
    """Train a run of a few meta-iterations and adapt it to new shapes, as a user does."""
    draw_folder(place / "shapes", TRAINED, 4)
    draw_folder(place / "support", NEW, 2, seed=1)
    draw_folder(place / "new", NEW, 6, seed=2)
    options = ["--ways", 3, "--iterations", 5, "--test-tasks", 4, "--out", place / "run"]
    assert exit_code("train", "--data", place / "shapes", *options) == 0
    assert exit_code("adapt", place / "run", place / "support") == 0
    return Own(place, place / "run", place / "run" / "adapted-support.safetensors")
