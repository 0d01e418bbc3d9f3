"""A folder of one's own, from the command line: train, adapt, predict."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from koi import CheckpointError, Koi
from koi.lab.runs import Classifier, Config, Run
from koi.lab.runs.measuring import newest_checkpoint
from koi.models import omniglot_net
from koi.recipes import own_folder
from own_folder_toys import NEW, TRAINED, draw_folder


@pytest.fixture
def place(own_run):
    return own_run.place


@pytest.fixture
def trained(own_run):
    return own_run.run


@pytest.fixture
def adapted(own_run):
    return own_run.classifier


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
        assert [learner.num_steps, learner.step_size] == [1, 0.4]

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
        model = omniglot_net(3, torch_defaults=True)
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
