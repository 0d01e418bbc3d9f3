"""The files of a run's folder, edited by hand: read, or refused by file, field and mend."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
from PIL import Image

from koi import ConfigurationError, Koi, KoiError, storage
from koi.lab import runs
from koi.lab.cli.classifier import _line
from koi.lab.markdown import code, text
from koi.lab.runs import Config, Run
from koi.lab.runs.card import write_card
from koi.lab.runs.training import Tasks
from koi.models import omniglot_net
from koi.recipes import RECIPES

RESULT = {"transductive": [0.9, 0.1], "inductive": [0.8, 0.1], "num_tasks": 3, "iteration": 0}


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint and results, which nothing was trained for."""
    config = Config(RECIPES["omniglot-5way"])
    made = Run.begun(tmp_path / "run", config)
    recipe = config.recipe
    made.checkpoints.mkdir()
    learner = Koi(omniglot_net(5), **recipe.settings(), seed=0)
    learner.save(made.checkpoints / "iteration-000000000.safetensors")
    made.add_result(1, RESULT)
    return made


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def used(run):
    """Do all that reads the files."""
    run.config()
    run.results()
    run.validations()
    run.environment()
    write_card(run)
    runs.markdown_table([run])


def refusal(run):
    """Return the words in which the files are refused; none where they are not."""
    try:
        used(run)
    except KoiError as error:
        return str(error)
    return ""


WRONG = [None, True, -1, 0.5, "x", "", [], [1], {}, {"x": 1}, 10**30, float("nan"), "\x1b[31m"]
RECIPE = RECIPES["omniglot-5way"].as_data()


@pytest.mark.parametrize(
    "name", [*RECIPE, *Config(RECIPES["omniglot-5way"]).as_data(), "made_with"]
)
def test_config(name, run):
    """A step_size that was edited was ignored, and printed in the card all the same."""
    path = run.folder / "config.json"
    whole = json.loads(path.read_text())
    for wrong in WRONG:
        data = copy.deepcopy(whole)
        (data["recipe"] if name in RECIPE else data)[name] = wrong
        path.write_text(json.dumps(data))
        if data == whole:
            continue
        said = refusal(run)
        assert said == "" or "config.json" in said or "model" in said
    path.write_text(json.dumps(whole))
    used(run)


def test_what_is_edited_is_named(run):
    path = run.folder / "config.json"
    edit(path, lambda data: data["recipe"].update(step_size=0.002))
    with pytest.raises(
        ConfigurationError, match=r"config\.json: step_size: 0.001 in the checkpoint, 0.002"
    ):
        write_card(run)
    edit(path, lambda data: data["recipe"].update(step_size="0.001"))
    with pytest.raises(
        ConfigurationError, match=r"config\.json: step_size = '0.001': .*; put it back"
    ):
        run.config()
    edit(path, lambda data: data["recipe"].update(step_sise=0.001))
    with pytest.raises(ConfigurationError, match=r"step_sise is no field; did you mean"):
        run.config()


@pytest.fixture
def trained(run):
    """The run's checkpoint as a training leaves it: with the configuration that it had."""
    path = run.checkpoints / "iteration-000000000.safetensors"
    tasks = Tasks(SimpleNamespace(state_dict=lambda: {"classes": ""}), run.config())
    storage.write(path, {**storage.read(path), "tasks": tasks.state_dict()})
    used(run)
    return run


OTHER = {
    **{"name": "x", "num_shots": 3, "num_queries": 2, "batch_size": 3, "torch_defaults": True},
    **{"problem": "folder", "adaptations": {"1": {"batch_size": 5, "num_steps": 7}}},
    **{"patience": 3, "num_validation": 3, "network": "mini-imagenet"},
    "classes": {"train": ["a"], "validation": [], "test": []},
}


@pytest.mark.parametrize("name", OTHER)
def test_what_no_setting_tells_is_told_by_the_checkpoint(name, trained):
    """The shots, the test tasks, the network's name: the card had them as they were edited."""

    def change(data):
        (data["recipe"] if name in data["recipe"] else data)[name] = OTHER[name]

    edit(trained.folder / "config.json", change)
    with pytest.raises(ConfigurationError, match=rf"config\.json: {name}: .* in the checkpoint, "):
        write_card(trained)


def test_data_can_move_and_machines_differ(trained, tmp_path):
    edit(trained.folder / "config.json", lambda data: data.update(data=str(tmp_path), device="cpu"))
    used(trained)


@pytest.mark.parametrize("config", [None, 3, "x", "{}", "[" * 10**5])
def test_a_checkpoint_whose_configuration_is_none(config, trained):
    path = trained.checkpoints / "iteration-000000000.safetensors"
    storage.write(path, {**storage.read(path), "tasks": {"config": config}})
    with pytest.raises(ConfigurationError, match="the checkpoint holds no configuration"):
        write_card(trained)


@pytest.mark.parametrize("content", [b"", b"[", b"3", b"\xff", b"[" * 100_000, b'{"recipe": 3}'])
def test_what_is_no_configuration(content, run):
    (run.folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        run.config()


@pytest.mark.parametrize("wrong", [*WRONG, [2.0, 0.1], ["a", "b"], [0.5]])
def test_results(wrong, run):
    path = run.folder / "results.json"
    for name in RESULT:
        edit(path, lambda data, name=name: data["1"].update({**RESULT, name: wrong}))
        said = refusal(run)
        assert said == "" or ("results.json: of 1 shots" in said and name in said)
    path.write_text(json.dumps({"one": RESULT}))
    with pytest.raises(ConfigurationError, match=r"results\.json: shots = 'one'"):
        run.results()


@pytest.mark.parametrize("line", ["x", "3", "{}", '{"iteration": "a"}', '{"iteration": 1, "x": 2}'])
def test_validations(line, run):
    run.validation.write_text(f'{{"iteration": 1, "1-shot inductive": 0.5}}\n{line}\n')
    with pytest.raises(ConfigurationError, match=r"validation\.jsonl: line 2 is no measurement"):
        run.validations()


@pytest.mark.parametrize(
    "name", ["README.md", "model.safetensors", "checkpoints/iteration-1.safetensors"]
)
def test_nothing_is_written_through_a_link(name, run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (run.folder / name).unlink(missing_ok=True)
    os.symlink(precious, run.folder / name)
    for write in (lambda: run.add_result(1, RESULT), lambda: write_card(run)):
        with pytest.raises(ConfigurationError, match="is a link, and Koi writes through none"):
            write()
    assert precious.read_text() == "precious"


def test_names_that_are_no_text(tmp_path):
    """Of files whose names are not in UTF-8, and of those with a terminal's orders in them."""
    names = [os.fsdecode(b"\xe9t\xe9"), "red\x1b[31m", "two\nlines"]
    classes = {"train": names, "validation": [], "test": ["a"]}
    config = Config(RECIPES["omniglot-5way"], classes=classes)
    assert Run.begun(tmp_path / "run", config).config() == config
    for name in names:
        for as_json in (True, False):
            line = _line(tmp_path / name, {name: 1.0}, 10, as_json)
            assert line.isprintable()
            line.encode()
        assert json.loads(_line(tmp_path / name, {name: 1.0}, 10, True))["class"] == name


def test_errors_and_warnings_reach_a_terminal_as_text(tmp_path):
    error = ConfigurationError([f"{tmp_path}\x1b[31m\udc80 is wrong", "so is this"])
    assert [line.isprintable() for line in str(error).split("\n")] == [True, True]


@pytest.mark.parametrize(
    "evil", ["<img src=x onerror=1>", "a|b", "```\n# x", "[x](javascript:1)", "\0"]
)
def test_markdown_of_anything(evil):
    shown = text(evil)
    assert "<" not in shown
    assert "\n" not in shown + code(evil)
    assert shown.isprintable()
    assert "|" not in code(evil).replace(r"\|", "")


def test_pictures_of_a_class_in_a_folder_of_links(tmp_path):
    """Two classes became 82."""
    from koi.fewshot.sources import class_folders

    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "0.png")
        os.symlink(tmp_path, tmp_path / name / "again")
    with pytest.raises(KoiError, match="once more, by a link"):
        class_folders(tmp_path)


def test_storage_of_a_forged_learner_is_refused(run):
    """A checkpoint in which another number of ways stands than in the configuration."""
    path = run.checkpoints / "iteration-000000000.safetensors"
    data = storage.read(path)
    data["params"]["13.bias"] = data["params"]["13.bias"][:1].expand(4).clone()
    storage.write(path, data)
    with pytest.raises(KoiError):
        write_card(run)
