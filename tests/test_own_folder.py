"""A folder of one's own, from the command line: train, adapt, predict."""

import json
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from koi import CheckpointError, ConfigurationError, DataError, Koi
from koi.lab.cli import main
from koi.lab.markdown import text
from koi.lab.runs import Classifier, Config, Run
from koi.lab.runs.measuring import newest_checkpoint
from koi.models import omniglot_net
from koi.recipes import RECIPES, own_folder

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


def empty_folder(root, counts):
    """Write class folders with files that nothing may read."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").touch()
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


@pytest.fixture
def koi(capsys):
    """Return a function that runs the command: (exit code, stdout, stderr)."""
    return lambda *arguments: (exit_code(*arguments), *capsys.readouterr())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images to learn from, to adapt to and to predict."""
    root = tmp_path_factory.mktemp("own")
    draw_folder(root / "shapes", TRAINED, 4)
    draw_folder(root / "support", NEW, 2, seed=1)
    draw_folder(root / "new", NEW, 6, seed=2)
    return root


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a run of a few meta-iterations, made as a user makes it."""
    out = place / "run"
    options = ["--ways", 3, "--iterations", 5, "--test-tasks", 4, "--out", out]
    assert exit_code("train", "--data", place / "shapes", *options) == 0
    return out


@pytest.fixture(scope="module")
def adapted(place, trained):
    """The file of a classifier of new shapes, made as a user makes it."""
    assert exit_code("adapt", trained, place / "support") == 0
    return trained / "adapted-support.safetensors"


@pytest.fixture(scope="module")
def files(place, trained, adapted):
    (place / "folder").mkdir()
    (place / "text").write_text("no file of Koi's")
    return {
        "run": trained,
        "checkpoint": newest_checkpoint(Run(trained)),
        "learner": trained / "learner.safetensors",
        "weights": trained / "model.safetensors",
        "classifier": adapted,
        "image": place / "new" / "bar" / "0.png",
        "folder": place / "folder",
        "text": place / "text",
        "nothing": place / "nothing",
    }


def predictions(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


class TestTrain:
    def test_a_run_is_trained_and_measured_on_classes_it_has_not_seen(self, trained):
        run = Run(trained)
        config = run.config()
        splits = config.splits()
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [5, 0, 3]
        assert {*splits.train.classes, *splits.test.classes} == set(TRAINED)
        assert run.results()[1]["iteration"] == config.recipe.num_iterations == 5
        checkpoint = newest_checkpoint(run)
        learner = Koi.load(checkpoint, config.recipe.model(), **config.recipe.code())
        assert [learner.num_steps, learner.step_size] == [5, 0.001]

    def test_the_card_says_how_to_make_such_a_run(self, trained):
        card = (trained / "README.md").read_text(encoding="utf-8")
        command = "koi train --data FOLDER --ways 3 --shots 1 --network omniglot --iterations 5"
        assert command in card

    def test_a_run_stands_by_its_classes_when_the_folder_gets_more(self, tmp_path, koi):
        folder = draw_folder(tmp_path / "shapes", ("ring", *TRAINED[:3]), 2)
        command = ["train", "--data", folder, "--ways", 2, "--iterations", 1, "--test-tasks", 0]
        out = ["--out", tmp_path / "run"]
        assert koi(*command, *out)[0] == 0
        assert koi(*command, *out)[0] == 0  # goes on
        before = Run(tmp_path / "run").config().splits()
        draw_folder(folder, ("cup",), 2)
        after = Run(tmp_path / "run").config().splits()
        assert (before.train.classes, before.test.classes) == (
            after.train.classes,
            after.test.classes,
        )
        code, _, said = koi(*command, *out)
        assert code == 2
        assert "(the images in the folder have changed since)" in said

    def test_a_folder_by_the_other_network_is_in_colour(self, place):
        recipe, classes = own_folder(place / "shapes", num_ways=3, network="mini-imagenet")
        splits = Config(recipe, data=str(place / "shapes"), classes=classes).splits()
        one = splits.train.take(torch.tensor(0), torch.tensor(0))
        assert one.shape == (3, 84, 84)
        assert recipe.model()(one.unsqueeze(0)).shape == (1, 3)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "what to train?"),
            (["--ways", "3"], "what to train?"),
            (["omniglot-5way", "--ways", "5"], "--ways: the recipe omniglot-5way has its own"),
            (["omniglot-5way", "--shots", "5", "--network", "x"], "--shots, --network: the rec"),
            (["--data", "nowhere"], "nowhere"),
            (
                ["--data", "shapes"],
                "5-way episodes need 10, 5 to learn from and 5 others",
            ),
            (["--data", "shapes"], "add classes, or take at most 4 ways"),
            (["--data", "new"], "new has 3 classes"),
            (["--data", "shapes", "--ways", "1"], "--ways"),
            (["--data", "shapes", "--ways", "4", "--shots", "4"], "8 of 8 classes have fewer than"),
            (["--data", "shapes", "--ways", "4", "--shots", "9"], "or take at most 3 shots"),
            (["--data", "shapes", "--network", "omniglott"], 'did you mean "omniglot"?'),
            (["--data", "new/ring"], "lies beside the class folders"),
            (
                ["--data", "shapes", "--device", "nonsense"],
                "--device: nonsense cannot be used",
            ),
            (["--data", "shapes", "--device", "cuda:99"], "--device: cuda:99 cannot be used here"),
            (["--data", "shapes", "--device", "meta"], "--device: meta cannot be used here"),
        ],
    )
    def test_what_cannot_be_trained_is_one_sentence(self, place, koi, monkeypatch, options, said):
        monkeypatch.chdir(place)
        code, _, stderr = koi("train", *options)
        assert code == 2
        assert said in stderr
        assert len(stderr.splitlines()) == 1
        assert not (place / "runs").exists()


class TestOwnFolder:
    @pytest.mark.parametrize(
        ("num_classes", "num_ways", "sizes"),
        [
            (10, 5, [5, 0, 5]),
            (19, 5, [14, 0, 5]),
            (20, 5, [10, 5, 5]),
            (100, 5, [60, 20, 20]),
            (80, 20, [40, 20, 20]),
            (4, 2, [2, 0, 2]),
        ],
    )
    def test_parts(self, tmp_path, num_classes, num_ways, sizes):
        names = [f"class {number}" for number in range(num_classes)]
        folder = empty_folder(tmp_path / "images", dict.fromkeys(names, 2))
        _, parts = own_folder(folder, num_ways)
        assert [len(parts[part]) for part in ("train", "validation", "test")] == sizes
        assert sorted(name for part in parts.values() for name in part) == sorted(names)
        assert parts == own_folder(folder, num_ways)[1]
        assert any(parts != own_folder(folder, num_ways, seed=seed)[1] for seed in range(1, 9))

    @pytest.mark.parametrize(
        ("num_images", "num_shots", "trained_with"),
        [(2, 1, 1), (6, 1, 5), (11, 5, 10), (40, 5, 10), (40, 15, 15), (16, 15, 15)],
    )
    def test_training_shots_are_the_papers_where_there_are_so_many(
        self, tmp_path, num_images, num_shots, trained_with
    ):
        counts = {**dict.fromkeys("abcdefghi", 50), "small": num_images}
        recipe, _ = own_folder(empty_folder(tmp_path / "images", counts), 5, num_shots)
        assert recipe.num_shots == trained_with
        assert list(recipe.adaptations) == [num_shots]

    @pytest.mark.parametrize(
        ("network", "num_ways", "nearest"),
        [
            ("omniglot", 2, "omniglot-5way"),
            ("omniglot", 15, "omniglot-20way"),
            ("mini-imagenet", 15, "mini-imagenet-5way"),
        ],
    )
    def test_settings_are_those_of_the_nearest_recipe(self, tmp_path, network, num_ways, nearest):
        folder = empty_folder(tmp_path / "images", {str(n): 30 for n in range(30)})
        recipe, _ = own_folder(folder, num_ways, network=network)
        for name in ("step_size", "batch_size", "num_steps", "num_shots"):
            assert getattr(recipe, name) == getattr(RECIPES[nearest], name)
        assert (recipe.num_iterations, recipe.patience) == (10_000, 6)
        assert recipe.adaptation(1) == RECIPES[nearest].adaptation(1)
        assert recipe.num_ways == num_ways

    def test_a_folder_that_is_in_parts_already_would_have_each_class_twice(self, tmp_path):
        names = [f"{part}/{name}" for part in ("train", "val") for name in "abcde"]
        folder = empty_folder(tmp_path / "images", dict.fromkeys(names, 3))
        with pytest.raises(DataError, match=r"is in parts already \(train, val\)"):
            own_folder(folder)
        assert own_folder(folder / "train", num_ways=2)

    def test_an_unknown_network(self, tmp_path):
        with pytest.raises(ConfigurationError, match="no network 'resnet'"):
            own_folder(tmp_path, network="resnet")


class TestAdaptAndPredict:
    def test_new_shapes_are_told_apart(self, place, adapted, koi):
        """Chance is a third: 12 of 18 by chance has a probability of 0.4 %."""
        code, stdout, stderr = koi("predict", adapted, place / "new", "--json")
        assert (code, stderr) == (0, "")
        lines = predictions(stdout)
        assert [line["file"] for line in lines] == [
            str(place / "new" / name / f"{number}.png") for name in NEW for number in range(6)
        ]
        for line in lines:
            assert line["probabilities"].keys() == set(NEW)
            assert sum(line["probabilities"].values()) == pytest.approx(1)
            assert line["probability"] == max(line["probabilities"].values())
            assert line["probabilities"][line["class"]] == line["probability"]
        assert sum(line["class"] == Path(line["file"]).parent.name for line in lines) >= 12

    def test_an_image_is_classified_alone_with_the_support_set(self, place, adapted, koi):
        """By hand, without Koi's reader: the plain weights, one forward."""
        paths = [place / "new" / name / "3.png" for name in ("ring", "bar")]
        tensors = safetensors.torch.load_file(adapted)
        model = omniglot_net(3)
        prefix = "weights."
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        support = tensors["classifier.support"]
        lines = predictions(koi("predict", adapted, *paths, "--json")[1])
        for path, line in zip(paths, lines, strict=True):
            image = Image.open(path).resize((28, 28), Image.Resampling.BILINEAR)
            query = torch.tensor(list(image.tobytes())).reshape(1, 1, 28, 28)
            scores = model(torch.cat([support, query]) / 255)[-1].detach()
            expected = dict(zip(NEW, scores.softmax(0).tolist(), strict=True))
            assert line["probabilities"] == pytest.approx(expected, abs=1e-5)

    def test_lines_to_read(self, place, adapted, koi):
        path = place / "support" / "ring" / "0.png"
        code, stdout, _ = koi("predict", adapted, path)
        assert code == 0
        file, probability, name = stdout.split()
        assert (file, name) == (str(path), "ring")
        assert 100 / 3 < float(probability.removesuffix("%")) <= 100

    def test_fewer_classes_than_ways_take_the_first_outputs(self, place, trained, tmp_path, koi):
        draw_folder(tmp_path / "two", ("bar", "ring"), 1)
        out = tmp_path / "two.safetensors"
        assert koi("adapt", trained, tmp_path / "two", "--steps", 20, "--out", out)[0] == 0
        last = Classifier.load(out).model.state_dict()["13.weight"]
        before = safetensors.torch.load_file(trained / "model.safetensors")["13.weight"]
        assert torch.equal(last[2], before[2])
        assert not torch.equal(last[:2], before[:2])
        stdout = koi("predict", out, place / "new" / "ring", "--json")[1]
        for line in predictions(stdout):
            assert line["probabilities"].keys() == {"bar", "ring"}
            assert sum(line["probabilities"].values()) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (("bar", "cross", "disc", "ring"), "has 4 classes, and the network"),
            (("bar",), "has 1 class, and the network"),
        ],
    )
    def test_more_classes_than_ways_or_one(self, trained, tmp_path, koi, names, said):
        folder = draw_folder(tmp_path / "support", names, 1)
        code, _, stderr = koi("adapt", trained, folder, "--out", tmp_path / "out.safetensors")
        assert code == 2
        assert said in stderr
        assert "from 2 to 3 apart" in stderr
        assert not (tmp_path / "out.safetensors").exists()

    def test_more_steps_are_another_classifier_and_the_same_again_the_same(
        self, place, trained, tmp_path, koi
    ):
        weights = []
        for steps in (3, 3, 4):
            out = tmp_path / "out.safetensors"
            assert koi("adapt", trained, place / "support", "--steps", steps, "--out", out)[0] == 0
            weights.append(safetensors.torch.load_file(out)["weights.0.weight"])
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])

    def test_what_cannot_be_read_is_named_and_the_rest_is_predicted(
        self, place, adapted, tmp_path, koi
    ):
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "empty.png").touch()
        good = place / "new" / "bar" / "0.png"
        given = [tmp_path / "nowhere.png", tmp_path / "text.png", good, tmp_path / "empty.png"]
        code, stdout, stderr = koi("predict", adapted, *given, "--json")
        assert code == 2
        assert [line["file"] for line in predictions(stdout)] == [str(good)]
        assert len(stderr.splitlines()) == 1
        for said in ("nowhere.png cannot be read (No such file", "text.png", "empty.png cannot"):
            assert said in stderr

    def test_a_folder_without_images(self, adapted, tmp_path, koi):
        code, _, stderr = koi("predict", adapted, tmp_path)
        assert code == 2
        assert "has no images" in stderr

    def test_a_folder_that_is_no_run(self, place, koi):
        code, _, stderr = koi("adapt", place / "new", place / "support")
        assert code == 2
        assert "is a folder without a run: give the folder of a run" in stderr

    def test_a_damaged_support_image_is_named_and_nothing_is_written(self, trained, tmp_path, koi):
        folder = draw_folder(tmp_path / "support", ("bar", "ring"), 1)
        (folder / "ring" / "1.png").write_bytes(b"")
        code, _, stderr = koi("adapt", trained, folder, "--out", tmp_path / "out.safetensors")
        assert code == 2
        assert "1.png cannot be read (is empty)" in stderr
        assert not (tmp_path / "out.safetensors").exists()

    def test_nowhere_to_write(self, place, trained, tmp_path, koi):
        out = tmp_path / "nowhere" / "out.safetensors"
        code, _, stderr = koi("adapt", trained, place / "support", "--steps", 1, "--out", out)
        assert code == 2
        assert "cannot be written" in stderr

    def test_files_that_hold_no_classifier(self, trained, adapted, tmp_path):
        content = adapted.read_bytes()
        (tmp_path / "cut").write_bytes(content[:-10])
        with pytest.raises(CheckpointError, match="is no file of Koi's, or damaged: give a fi"):
            Classifier.load(tmp_path / "cut")
        with pytest.raises(
            CheckpointError, match=r"is a learner, .*: give a file that koi adapt w"
        ):
            Classifier.load(newest_checkpoint(Run(trained)))
        with pytest.raises(CheckpointError, match="is not there"):
            Classifier.load(tmp_path / "nowhere")


class TestEachOthersFiles:
    """Each command on what the others write: what it is, what is wanted, and how to get that."""

    KINDS = {  # noqa: RUF012
        "run": "is the folder of a run",
        "checkpoint": "is a learner, as checkpoints are and what koi export writes",
        "learner": "is a learner, as checkpoints are and what koi export writes",
        "weights": "is a file of plain weights",
        "classifier": "is a classifier, which koi adapt wrote",
        "image": "is an image",
        "folder": "is a folder without a run",
        "text": "is no file of Koi's, or damaged",
        "nothing": "is not there",
    }

    @pytest.mark.parametrize(
        ("command", "rightly", "wanted"),
        [
            (["evaluate"], ["run"], "give the folder of a run, which koi train makes"),
            (["table"], ["run"], "give the folder of a run, which koi train makes"),
            (["export", None, "out"], ["run"], "give the folder of a run, which koi train makes"),
            (["adapt", None, "support"], ["run"], "give the folder of a run, which koi train mak"),
            (["predict", None, "new"], ["classifier"], "give a file that koi adapt wrote"),
            (
                ["demo", "--no-open", "--checkpoint"],
                ["run", "checkpoint", "learner"],
                "give the folder of a run, a checkpoint in it, or what koi export wrote",
            ),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_is_given_and_what_is_wanted(
        self, files, place, koi, monkeypatch, command, rightly, wanted
    ):
        monkeypatch.chdir(place)
        for kind, path in files.items():
            if kind in rightly:
                continue
            words = [path if word is None else word for word in command]
            code, stdout, stderr = koi(*words, *([] if None in command else [path]))
            end = f"adapt it first, by koi adapt {path} SUPPORT_FOLDER"
            end = end if kind == "run" and command[0] == "predict" else wanted
            if kind == "folder":
                end = "give the folder of a run, which koi train makes"
                end = wanted if command[0] == "predict" else end
            assert (code, stdout) == (2, "")
            assert stderr.startswith(f"koi: {path} {self.KINDS[kind]}: {end}"), stderr
            assert len(stderr.splitlines()) == 1
        assert not (place / "out").exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["export", "run", "missing/folder/x"], "(No such file or directory): φ and earlier"),
            (["export", "run", "missing/folder/x"], "; make its folder, or choose another"),
            (["export", "run", "new"], "(Is a directory): φ and earlier"),
            (["adapt", "run", "support", "--out", "text/x"], "what should be its folder is a file"),
            (["train", "--data", "shapes", "--ways", "3", "--out", "text"], "a file of that name"),
            (
                ["train", "--data", "shapes", "--ways", "3", "--out", "text/x"],
                "should be its folder",
            ),
            (["evaluate", "run", "--shots", "20", "--tasks", "2"], "has 4: take 3 or fewer"),
            (["evaluate", "run", "--tasks", "0"], "--tasks"),
            (["train", "mini-imagenet-5way", "--out", "mini"], "give them by --data"),
        ],
    )
    def test_what_cannot_be_done_has_a_mend(self, files, place, koi, monkeypatch, words, said):
        monkeypatch.chdir(place)
        code, _, stderr = koi(*words)
        assert code == 2
        assert said in stderr
        assert len(stderr.splitlines()) == 1

    def test_a_run_without_a_result_is_named_after_the_others(self, files, place, trained, koi):
        bare = place / "bare"
        bare.mkdir(exist_ok=True)
        (bare / "config.json").write_bytes((trained / "config.json").read_bytes())
        code, stdout, stderr = koi("table", bare, trained)
        assert code == 2
        assert stdout.splitlines()[2].startswith(f"| {text(trained)} | folder-3way | 5 | 1 | 4 |")
        assert "–" not in stdout
        assert stderr == f"koi: {bare} has no result yet: measure it by koi evaluate {bare}\n"

    def test_on_a_terminal_a_table_is_for_people(self, trained, koi, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        code, stdout, _ = koi("table", trained)
        assert code == 0
        assert "┃" in stdout
        assert "the paper" not in stdout
