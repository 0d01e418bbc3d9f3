"""The model card, as the Hub's own library reads it."""

import runpy
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_model
from torch import nn

import forked
import koi.models
from koi import CheckpointError, ConfigurationError, Koi
from koi.fewshot import labelled
from koi.lab.card import model_card
from koi.lab.runs import Config, Run, write_card
from koi.recipes import RECIPES, recipe_named
from toys import Regressions, small_net

CONFIG = {
    "name": 'five "ways": one shot',
    "description": "Learns to tell five characters apart from one drawing of each.",
    "license": "mit",
    "model": "koi.models.omniglot_net(num_classes=5)",
    "settings": {"step_size": 0.001, "num_steps": 5, "meta_step_size": koi.linear(1.0, 0.0)},
    "data": {
        "name": "Omniglot",
        "license": "MIT",
        "url": "https://example.org",
        "id": "a/omniglot",
    },
    "command": "koi train omniglot-5-1",
    "versions": {"koi-x": "0.1.0", "torch": "2.13.0"},
}
RESULTS = [
    {"task": "5-way 1-shot", "metric": "accuracy", "value": 0.9768, "interval": 0.0004},
    {"task": "5-way 5-shot", "metric": "accuracy", "value": 0.9948},
]


def test_the_hub_reads_it():
    head = ModelCard(model_card(CONFIG, RESULTS)).data
    assert (head.license, head.library_name) == ("mit", "pytorch")
    assert head.model_name == CONFIG["name"]
    assert head.datasets == ["a/omniglot"]
    assert {"koi", "reptile", "meta-learning"} <= set(head.tags)
    read = [(r.task_name, r.metric_type, r.metric_value) for r in head.eval_results]
    assert read == [(r["task"], r["metric"], r["value"]) for r in RESULTS]
    assert {r.dataset_name for r in head.eval_results} == {"Omniglot"}


def test_numbers_are_rounded():
    results = [{"task": "5-way", "metric": "accuracy", "value": 0.8399999999999999}]
    card = model_card(CONFIG, results)
    assert "0.839999" not in card
    assert ModelCard(card).data.eval_results[0].metric_value == 0.84


def test_the_hub_reads_it_before_anything_is_measured():
    head = ModelCard(model_card({**CONFIG, "data": {"name": "ours", "license": "none"}})).data
    assert head.eval_results is None
    assert head.datasets is None


def test_without_the_hubs_library_it_is_for_people_alone(monkeypatch):
    whole = model_card(CONFIG, RESULTS)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert whole.endswith("---\n\n" + model_card(CONFIG, RESULTS))


def test_everything_is_told():
    card = model_card(CONFIG, RESULTS)
    for text in (
        CONFIG["description"],
        CONFIG["command"],
        "| `num_steps` | `5` |",
        "`linear(start=1.0, end=0.0)`",
        "[Omniglot](https://example.org); licence: MIT.",
        "| 5-way 1-shot | accuracy | 0.9768 | ± 0.0004 |",
        "koi-x 0.1.0, torch 2.13.0",
    ):
        assert text in card


def test_its_code_runs(tmp_path):
    """The block under "Use", beside the file that it loads, with a task in its place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    save_model(model, tmp_path / "model.safetensors")
    config = {**CONFIG, "model": "torch.nn.Sequential(torch.nn.Linear(3, 2))"}
    code = model_card(config).split("```python\n")[1].split("```")[0]
    task = (
        "import torch\n"
        "class task:\n"
        "    loss = staticmethod(lambda model: model(torch.ones(1, 3)).square().sum())\n"
    )
    after = "print(model[0].weight.tolist(), adapted[0].weight.equal(model[0].weight))"
    script = tmp_path / "use.py"
    script.write_text(task + code + after, encoding="utf-8")
    done = forked.run_script(script, cwd=tmp_path, output=tmp_path, variables={})
    assert done.stdout.strip() == f"{model[0].weight.tolist()} False", done.stderr


def test_its_code_brings_koi_models(tmp_path):
    """In a process that has not imported them, as that of whoever reads the card."""
    code = model_card(CONFIG).partition("```python\n")[2].partition("load_model(model")[0]
    script = tmp_path / "use.py"
    script.write_text(code + "print(len(list(model)))", encoding="utf-8")
    done = forked.run_script(script, cwd=tmp_path, output=tmp_path, variables={})
    assert done.stdout.strip() == str(len(list(koi.models.omniglot_net(5)))), done.stderr


def test_the_card_of_a_run(tmp_path):
    """From its folder alone; its code makes the network and the learner of the recipe."""
    recipe = replace(recipe_named("omniglot-5way"), num_iterations=7)
    run = Run.begun(tmp_path / "run", Config(recipe))
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        write_card(run)
    learner = Koi(recipe.model(), **recipe.settings(), seed=0)
    learner._state.iteration = 7
    run.checkpoints.mkdir()
    learner.save(run.checkpoints / "iteration-000000007.safetensors")
    write_card(run)
    assert ModelCard((run.folder / "README.md").read_text("utf-8")).data.eval_results is None
    result = {"transductive": [0.9, 0.02], "inductive": [0.8, 0.03], "iteration": 7}
    result |= {"num_tasks": 100, "num_skipped": 0, "seconds": 1.0}
    run.add_result(5, result)
    run.add_result(1, {**result, "iteration": 5})  # of another φ
    write_card(run)

    text = (run.folder / "README.md").read_text("utf-8")
    head = ModelCard(text).data
    assert (head.model_name, head.license) == ("omniglot-5way", "mit")
    assert [r.metric_value for r in head.eval_results] == [0.8, 0.9]
    assert "| 5-way 5-shot, inductive | accuracy | 0.8 | ± 0.03 |" in text
    assert "koi train omniglot-5way --iterations 7 --seed 0" in text
    assert "1-shot" not in text


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("omniglot-5way")])
def test_the_code_of_a_run_adapts_as_its_recipe_does(name, tmp_path):
    """By the inner optimizer, moments and rates of the training."""
    recipe = replace(recipe_named(name), num_iterations=2)
    run = Run.begun(tmp_path / "run", Config(recipe))
    torch.manual_seed(0)
    learner = Koi(recipe.model(), **recipe.settings(), seed=0)
    data = labelled((torch.rand(5 * 25, 1, 28, 28), torch.arange(5).repeat_interleave(25)))
    learner.train(recipe.training_episodes(data))
    run.checkpoints.mkdir()
    learner.save(run.checkpoints / "iteration-000000002.safetensors")
    write_card(run)
    card = (run.folder / "README.md").read_text("utf-8")

    task = recipe.test_episodes(data, 1).sample()
    block = card.partition("```python\n")[2].partition("```")[0]
    code = block.replace(run.learner.name, str(run.learner))
    script = tmp_path / "use.py"
    script.write_text(code, encoding="utf-8")
    found = runpy.run_path(str(script), {"task": task})
    expected = learner.adapt(task, recipe.adaptation(1).num_steps).state_dict()
    torch.testing.assert_close(found["adapted"].state_dict(), expected)
    optimizer = {"sgd": "SGD", "adam": "Adam, β1 = 0"}[recipe.inner_optimizer]
    assert f"| `inner_optimizer` | `{optimizer}` |" in card


def test_inner_optimizer_is_in_its_code():
    card = model_card({**CONFIG, "settings": {"step_size": 0.1, "inner_optimizer": "adam"}})
    assert "learner = koi.Koi(model, step_size=0.1, inner_optimizer='adam')" in card
    card = model_card({**CONFIG, "settings": {"step_size": 0.1, "inner_optimizer": "Adam, β1 = 0"}})
    assert "learner = koi.Koi(model, step_size=0.1)" in card


def test_what_is_missing_is_named():
    config = {key: CONFIG[key] for key in CONFIG if key not in ("license", "model")}
    with pytest.raises(ConfigurationError) as error:
        model_card({**config, "data": {"name": "ours"}}, [{"task": "any", "value": 1.0}])
    assert error.value.problems == (
        "the config of a model card lacks 'license'",
        "the config of a model card lacks 'model'",
        "the data of a model card lack 'license'",
        "result 0 of a model card lacks 'metric'",
    )


def test_a_saved_model_loads_without_koi(tmp_path, monkeypatch):
    """Into the same class, by torch and safetensors alone."""
    learner = Koi(small_net(), num_iterations=2, num_steps=2)
    learner.train(Regressions())
    save_model(learner.model, tmp_path / "model.safetensors")
    inputs = torch.randn(4, 3)
    torch.save((inputs, learner(inputs).detach()), tmp_path / "expected.pt")
    code = """
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
model.load_state_dict(load_file("model.safetensors"))
inputs, expected = torch.load("expected.pt", weights_only=True)
assert torch.equal(model(inputs), expected)
"""
    (tmp_path / "use.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "koi"]:
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path("use.py")
