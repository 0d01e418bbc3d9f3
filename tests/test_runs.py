"""Run folders: train, stop, go on, measure, compare."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import koi.lab.runs.measuring
import koi.lab.runs.training
from koi import CheckpointError, ConfigurationError, DataError, Koi, NonFiniteError
from koi.fewshot import Episodes, LabelledData, Splits
from koi.lab.markdown import text
from koi.lab.runs import Config, Run, export, markdown_table, measure, train, write_card
from koi.lab.runs.folder import environment
from koi.lab.runs.measuring import chosen_checkpoint, measuring_learner, newest_checkpoint
from koi.lab.runs.training import Forecast
from koi.models import omniglot_net
from koi.recipes import RECIPES, Adaptation, FewShotRecipe

SMALL = replace(
    RECIPES["omniglot-5way"],
    num_iterations=4,
    num_steps=2,
    num_shots=2,
    meta_batch_size=2,
    adaptations={1: Adaptation(5, 2), 5: Adaptation(5, 3)},
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """Random images in the place of Omniglot, and few of everything."""
    names = [f"class {i}" for i in range(18)]
    images = torch.randint(256, (18 * 7, 1, 28, 28), dtype=torch.uint8)
    data = LabelledData(images, names, [7] * 18)
    splits = Splits(*data.split(6, 6, 6))
    monkeypatch.setattr(Config, "splits", lambda config: splits)
    monkeypatch.setattr(koi.lab.runs.training, "_LEAST_DISTANCE", 2)
    monkeypatch.setattr(koi.lab.runs.training, "_VALIDATION_TASKS", 3)


def test_a_run_leaves_all_that_is_wanted(tmp_path):
    run = Run.begun(tmp_path / "run", Config(SMALL, seed=3))
    learner = train(run)
    assert [line["iteration"] for line in run.validations()] == [2, 4]
    assert set(run.validations()[0]) == {
        "iteration",
        "1-shot transductive",
        "1-shot inductive",
        "5-shot transductive",
        "5-shot inductive",
        "1-shot num_skipped",
        "5-shot num_skipped",
    }
    metrics = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == [0, 1, 2, 3]
    # the weights load without Koi
    plain = omniglot_net(5)
    plain.load_state_dict(load_file(run.weights))
    for name, value in learner.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    assert Run(run.folder).config() == Config(SMALL, seed=3)


@pytest.mark.parametrize("at", [2, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(at, tmp_path, monkeypatch):
    """In a validation, also in the last: then repeating the command still has that to do."""
    whole = Run.begun(tmp_path / "whole", Config(SMALL))
    train(whole)

    class StoppedError(Exception):
        pass

    original = koi.lab.runs.training.Validation.__call__

    def stop(validation, learner):
        if learner.iteration == at:
            raise StoppedError
        return original(validation, learner)

    monkeypatch.setattr(koi.lab.runs.training.Validation, "__call__", stop)
    stopped = Run.begun(tmp_path / "stopped", Config(SMALL))
    with pytest.raises(StoppedError):
        train(stopped)
    assert not stopped.weights.exists()
    monkeypatch.setattr(koi.lab.runs.training.Validation, "__call__", original)
    train(Run.begun(tmp_path / "stopped", Config(SMALL)))
    assert stopped.validations() == whole.validations()
    there, here = load_file(stopped.weights), load_file(whole.weights)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_another_configuration_does_not_mix_with_a_run(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    longer = Config(replace(SMALL, num_iterations=5), seed=1)
    run.checkpoints.mkdir()
    (run.checkpoints / "iteration-000000001.safetensors").touch()
    with pytest.raises(ConfigurationError) as caught:
        Run.begun(tmp_path, longer)
    assert str(caught.value) == (
        f"{tmp_path} holds another run (--iterations 4 there, 5 here; --seed 0 there, 1 here): "
        "choose another folder by --out, or go on as it began"
    )
    assert run.config() == Config(SMALL)
    with pytest.raises(ConfigurationError, match="omniglot-5way there, omniglot-20way here"):
        Run.begun(tmp_path, Config(RECIPES["omniglot-20way"]))
    with pytest.raises(ConfigurationError, match=r"\(step_size 0.001 there, 0.1 here\)"):
        Run.begun(tmp_path, Config(replace(SMALL, step_size=0.1)))


@pytest.mark.parametrize("was_read", [False, True])
def test_a_folder_in_which_nothing_was_trained_is_nobodys_run(tmp_path, monkeypatch, was_read):
    """It failed before its first meta-iteration: at its data, or at its first loss."""

    def fail(*_):
        raise DataError("images that cannot be read")

    with monkeypatch.context() as patch:
        owner, name = (FewShotRecipe, "training_episodes") if was_read else (Config, "splits")
        patch.setattr(owner, name, fail)
        with pytest.raises(DataError):
            train(Run.begun(tmp_path, Config(SMALL)))
    other = Config(replace(SMALL, num_shots=1), seed=3)
    learner = train(Run.begun(tmp_path, other))
    assert learner.iteration == 4
    assert Run(tmp_path).config() == other
    with pytest.raises(ConfigurationError, match="holds another run"):
        Run.begun(tmp_path, Config(SMALL))


def test_a_run_that_is_killed_before_its_first_checkpoint_is_somebodys(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigurationError, match="holds another run"):
        Run.begun(tmp_path, Config(SMALL, seed=1))


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigurationError, match="is not there: give the folder of a run"):
        Run(tmp_path / "nothing").config()
    (tmp_path / "config.json").write_text('{"recipe": 3}')
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        Run(tmp_path).config()
    run = Run.begun(tmp_path / "untrained", Config(SMALL))
    with pytest.raises(CheckpointError, match="train it first"):
        measure(run, 1, 2)


def test_measuring_is_repeatable_and_leaves_the_checkpoint_alone(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    train(run)
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}
    first = measure(run, 1, 5)
    again = measure(run, 1, 5)
    assert first["transductive"] == again["transductive"]
    assert first["inductive"] == again["inductive"]
    assert first["iteration"] == 4
    assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before
    measure(run, 5, 4)
    assert {shots: found["num_tasks"] for shots, found in run.results().items()} == {1: 5, 5: 4}


def test_the_table_states_its_distance_from_the_paper(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    found = {"inductive": [0.8, 0.01], "transductive": [0.9, 0.02], "iteration": 4, "num_tasks": 9}
    run.add_result(1, found)
    run.add_result(3, found)
    rows = [line.strip("| ").split(" | ") for line in markdown_table([run]).splitlines()]
    assert rows[0] == ["run", "recipe", "meta-iterations", "shots", "tasks", *rows[0][5:]]
    begin = [text(tmp_path), "omniglot-5way", "4 of 100,000 (shortened)"]
    assert rows[2:] == [
        [*begin, "1", "9", "inductive", "80.00 ± 1.00", "95.39 ± 0.09", "-15.39"],
        [*begin, "1", "9", "transductive", "90.00 ± 2.00", "97.68 ± 0.04", "-7.68"],
        [*begin, "3", "9", "inductive", "80.00 ± 1.00", "–", "–"],
        [*begin, "3", "9", "transductive", "90.00 ± 2.00", "–", "–"],
    ]


def test_a_training_longer_than_its_recipe_is_not_called_shortened(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    mean = 0.9768 - 1e-7
    found = {"inductive": [mean, 0.01], "transductive": [mean, 0.01], "num_tasks": 9}
    run.add_result(1, found | {"iteration": 200_000})
    row = markdown_table([run]).splitlines()[3].strip("| ").split(" | ")
    assert row[2] == "200,000 (longer than its 100,000)"
    assert row[-1] == "+0.00"


def test_a_table_has_no_empty_columns_and_names_runs_by_their_folders(tmp_path):
    found = {"inductive": [0.8, 0.01], "transductive": [0.9, 0.02], "iteration": 4, "num_tasks": 9}
    own = replace(SMALL, name="folder-5way", problem="folder")
    opened = [Run.begun(tmp_path / name, Config(own)) for name in ("one", "a|b")]
    for run in opened:
        run.add_result(1, found)
    head, _, *rows = markdown_table(opened).splitlines()
    assert head == "| run | recipe | meta-iterations | shots | tasks | accuracy, % | this run |"
    assert [row.split(" | ")[0] for row in rows[::2]] == [
        f"| {text(tmp_path)}/one",
        f"| {text(tmp_path)}/a\\|b",
    ]


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_the_code_of_its_card_adapts_as_it_was_measured(algorithm, tmp_path, monkeypatch):
    """With the moments of the training, which make a difference."""
    rate = None if algorithm == "reptile" else 0.01
    recipe = replace(SMALL, algorithm=algorithm, meta_rate=rate, num_queries=1)
    run = Run.begun(tmp_path / "run", Config(recipe))
    train(run)
    write_card(run)
    task = recipe.test_episodes(run.config().splits().test, 1).sample()
    code = (run.folder / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run.folder)
    names = {"task": task}
    exec(code, names)
    learner = measuring_learner(newest_checkpoint(run), run.config(), 1)
    adapted = learner.adapt(task).state_dict()
    learner.inner_state = "reset"
    fresh = learner.adapt(task).state_dict()
    found = names["adapted"].state_dict()
    assert all(torch.equal(found[name], value) for name, value in adapted.items())
    assert not all(torch.equal(found[name], value) for name, value in fresh.items())


@pytest.mark.parametrize(("device", "expected"), [("cpu", "a CPU"), ("cuda:0", "a GPU")])
def test_the_processor_is_the_one_that_it_ran_on(device, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "model name\t: a CPU")
    assert environment(device)["processor"] == expected


@pytest.mark.parametrize(
    ("compile", "num_tasks", "expected"), [(True, 3, True), (True, 2, False), (False, 3, False)]
)
def test_many_test_tasks_are_adapted_to_by_a_graph(
    compile, num_tasks, expected, tmp_path, monkeypatch
):
    """Of a training that was compiled, too."""
    run = Run.begun(tmp_path, Config(SMALL))
    train(run)
    compiled, original = [], koi.lab.runs.measuring.measured

    def measured(learner, *arguments):
        compiled.append(learner.compile)
        learner.compile = False
        return original(learner, *arguments)

    monkeypatch.setattr(koi.lab.runs.measuring, "measured", measured)
    monkeypatch.setattr(koi.lab.runs.measuring, "_WORTH_A_GRAPH", 3)
    assert measure(run, 1, num_tasks, compile=compile)["num_tasks"] == num_tasks
    assert compiled == [expected]


def test_what_was_left_out_is_told_wherever_accuracies_are(tmp_path, monkeypatch):
    """A network that diverges on a test task; its training is not ended by one that it watches."""
    original, count = FewShotRecipe.test_episodes, 2

    class Moody(Episodes):
        def sample_batch(self, num_tasks):
            tasks = super().sample_batch(num_tasks)
            tasks.support_inputs[:count] = float("nan")
            return tasks

    def episodes(*arguments):
        made = original(*arguments)
        made.__class__ = Moody
        return made

    monkeypatch.setattr(FewShotRecipe, "test_episodes", episodes)
    run = Run.begun(tmp_path, Config(SMALL))
    train(run)
    assert [line["1-shot num_skipped"] for line in run.validations()] == [2, 2]
    found = measure(run, 1, 5)
    assert (found["num_tasks"], found["num_skipped"]) == (3, 2)
    assert run.results()[1] == found
    assert "| 3 (2 left out) |" in markdown_table([run])
    write_card(run)
    card = (run.folder / "README.md").read_text("utf-8")
    assert "| 5-way 1-shot, inductive (2 tasks left out as not finite) | accuracy |" in card
    count = 3
    with pytest.raises(NonFiniteError, match="all of the 3 tasks"):
        measure(run, 1, 3)


def test_an_exported_run_is_small_and_adapts_as_the_run_does(tmp_path):
    run = Run.begun(tmp_path / "run", Config(SMALL))
    learner = train(run)
    export(run, tmp_path / "learner.safetensors")
    assert (tmp_path / "learner.safetensors").stat().st_size < 1_000_000
    loaded = Koi.load(tmp_path / "learner.safetensors", SMALL.model(), **SMALL.code())
    task = SMALL.test_episodes(run.config().splits().test, 1).sample()
    adapted = [koi.adapt(task).state_dict() for koi in (learner, loaded)]
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])
    assert loaded.history == []


def test_validation_decides_when_to_end_and_what_is_kept(tmp_path, monkeypatch):
    """A folder of one's own: the best φ is what is measured, adapted from and exported."""
    monkeypatch.setattr(koi.lab.runs.training, "_DISTANCE_OF_PATIENCE", 1)
    values = iter([0.5, 0.2, 0.3, 0.4, 0.1])
    monkeypatch.setattr(koi.lab.runs.training.Validation, "__call__", lambda *_: next(values))
    recipe = replace(SMALL, problem="folder", num_iterations=9, patience=2)
    run = Run.begun(tmp_path, Config(recipe))
    monkeypatch.setattr(koi.lab.runs.training, "_NUM_TIMED", 1)
    said = []
    learner = train(run, say=said.append)
    assert (learner.iteration, learner.best.iteration) == (4, 2)
    (line,) = said
    assert line.startswith("The other 8 meta-iterations will take about")
    kept = Koi.load(chosen_checkpoint(run), SMALL.model(), **SMALL.code())
    assert kept.iteration == 2
    weights = load_file(run.weights)
    assert all(torch.equal(value, weights[name]) for name, value in kept.model.state_dict().items())
    assert measure(run, 1, 2)["iteration"] == 2
    assert export(run, tmp_path / "learner.safetensors") == 2
    assert train(Run.begun(tmp_path, Config(recipe))).iteration == 4  # it stays ended


def test_how_long_it_will_take_is_said_once():
    """After ten meta-iterations, of which the first ones took longer."""
    said = []
    forecast = Forecast(replace(SMALL, num_iterations=100_010, patience=6), said.append)
    for number, seconds in enumerate([9.0, 5.0, *[0.288] * 18], 1):
        forecast(SimpleNamespace(iteration=number), SimpleNamespace(seconds=seconds))
    assert said == [
        "The other 100,000 meta-iterations will take about 8 hours (at most, 0.29 s each, "
        "validation aside)"
    ]


def test_shots_that_there_are_no_images_for(tmp_path):
    run = Run.begun(tmp_path, Config(SMALL))
    train(run)
    with pytest.raises(DataError, match=r"20 shots need 21 .* has 7: take 6 or fewer"):
        measure(run, 20, 2)
    assert run.results() == {}
