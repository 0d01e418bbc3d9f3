"""Every public callable with arguments that work, and values that no argument was meant to have."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import koi
from koi import Koi, SupervisedTask, algorithms, fewshot, models, plots, problems, recipes
from koi.fewshot import Accuracy, Episodes, Estimate, LabelledData, Splits, labelled
from koi.lab.card import model_card
from koi.problems import Lines, Sines, mini_imagenet, omniglot, omniglot_archives
from koi.training.logs import append

DOORS = (koi, algorithms, fewshot, problems, mini_imagenet, omniglot, models, recipes, plots)


class Call(NamedTuple):
    """A callable and arguments with which it works, made anew for each call."""

    function: Callable[..., Any]
    arguments: Callable[[], Mapping[str, Any]]


def learner(**settings: Any) -> Koi:
    return Koi(nn.Linear(1, 1), step_size=0.01, num_steps=2, num_iterations=2, **settings)


def trained() -> Koi:
    made = learner(average=0.9)
    made.train(Lines())
    return made


def supervised() -> SupervisedTask:
    return SupervisedTask(**of_a_task())


WITHOUT_CLASSES: dict[str, Any] = {"num_ways": None, "capacity": (6, 6)}


def of_a_task() -> dict[str, Any]:
    x = torch.linspace(-1, 1, 6).unsqueeze(1)
    sets = {"support_inputs": x, "support_targets": x, "query_inputs": x, "query_targets": x}
    return {**sets, "key": torch.tensor(1), "criterion": nn.functional.mse_loss, "batch_size": 4}


def data() -> LabelledData:
    return labelled((torch.rand(12, 1, 4, 4), torch.arange(12) % 4))


def episodes() -> Episodes:
    return Episodes(data(), num_ways=2, num_shots=1)


def recipe() -> recipes.FewShotRecipe:
    return recipes.RECIPES["omniglot-5way"]


def of_a_recipe() -> dict[str, Any]:
    return {each.name: getattr(recipe(), each.name) for each in dataclasses.fields(recipe())}


def evaluation() -> koi.Evaluation:
    return koi.Evaluation(torch.tensor([[4.0, 1.0], [2.0, 1.0]]))


def wave() -> plots.Wave:
    x = torch.linspace(-1, 1, 5).unsqueeze(1)
    return plots.Wave(x, x, x, x, {0: x, 1: x, 2: x})


def an_episode() -> dict[str, Any]:
    images, classes = torch.rand(2, 1, 4, 4), torch.arange(2)
    sets = {"support_inputs": images, "support_targets": classes, "query_inputs": images}
    return {**sets, "query_targets": classes, "scores": torch.eye(2), "names": ["a", "b"]}


def saved(path: str = "koi.safetensors") -> str:
    if not Path(path).exists():
        learner().save(path)
    return path


def folder(path: str = "folder") -> str:
    for name in "abcd" if not Path(path).exists() else "":
        Path(path, name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (4, 4)).save(Path(path, name, f"{number}.png"))
    return path


def card() -> dict[str, Any]:
    return {
        **dict.fromkeys(("name", "description", "license", "model", "learner", "command"), "x"),
        "settings": {"step_size": 0.1, "num_steps": 5},
        "data": {"name": "waves", "license": "none", "url": "https://example.org"},
        "versions": {"torch": "2"},
    }


def options(**more: Any) -> dict[str, Any]:
    """All arguments of `Koi.train`."""
    given = {"tasks": Lines(), "progress": False, "callbacks": [], "checkpoint_dir": "kept"}
    given |= {"checkpoint_every": 1, "resume": True, "log_dir": "log", "validate": Lines()}
    return {**given, "validate_every": 1, "keep_best": True, "patience": 2, "workers": 0, **more}


SCHEDULE = {"start": 1.0, "end": 0.0}
RESULT = {"transductive": [0.9, 0.1], "inductive": [0.8, 0.1], "iteration": 3}
SETTINGS = {each.name: each.default for each in dataclasses.fields(koi.learner.Settings)}
SHORT = {"num_tasks": 2, "num_steps": 1, "step_size": 0.01}
TWO = torch.tensor([[1.0, 0.5], [1.0, 1.0]])

CALLS = {
    "Koi": Call(Koi, lambda: {"model": nn.Linear(1, 1), **SETTINGS}),
    "Koi.train": Call(lambda **given: learner(seed=0).train(**given), options),
    "Koi.step": Call(lambda **given: learner().step(**given), lambda: {"tasks": Lines()}),
    "Koi.adapt": Call(
        lambda **given: learner().adapt(**given),
        lambda: {"task": Lines().sample(), "num_steps": 2, "step_size": 0.1},
    ),
    "Koi.evaluate": Call(
        lambda **given: learner().evaluate(**given), lambda: {"tasks": Lines(), **SHORT}
    ),
    "Koi.measure": Call(
        lambda **given: learner().measure(**given),
        lambda: {"tasks": Lines(), "metric": lambda model, task: torch.zeros(1), **SHORT},
    ),
    "Koi.save": Call(lambda **given: learner().save(**given), lambda: {"path": "other"}),
    "Koi.load": Call(Koi.load, lambda: {"path": saved(), "model": nn.Linear(1, 1), "num_steps": 3}),
    "Koi.load_state_dict": Call(
        lambda **given: learner().load_state_dict(**given),
        lambda: {"state": learner().state_dict()},
    ),
    "Koi.averaged": Call(lambda: trained().averaged(), dict),
    "Koi.state_dict": Call(lambda: trained().state_dict(), dict),
    "ClientTasks": Call(koi.ClientTasks, lambda: {"tasks": Lines()}),
    "SupervisedTask": Call(SupervisedTask, of_a_task),
    "RaggedTask": Call(
        koi.RaggedTask, lambda: {**of_a_task(), "num_ways": None, "capacity": (6, 6)}
    ),
    "SupervisedTask.minibatches": Call(
        lambda **given: supervised().minibatches(**given), lambda: {"num_steps": 2}
    ),
    "Evaluation": Call(koi.Evaluation, lambda: {"losses": torch.ones(2, 3), "num_skipped": 0}),
    "Record": Call(koi.Record, lambda: dataclasses.asdict(trained().history[0])),
    "cosine": Call(koi.cosine, lambda: SCHEDULE),
    "linear": Call(koi.linear, lambda: SCHEDULE),
    "warmup": Call(koi.warmup, lambda: {"then": 1.0, "part": 0.2}),
    "stack": Call(koi.stack, lambda: {"tasks": [supervised(), supervised()]}),
    "tensor_task": Call(koi.tensor_task, lambda: {"cls": SupervisedTask}),
    "Reptile": Call(algorithms.Reptile, dict),
    "EigenReptile": Call(algorithms.EigenReptile, dict),
    "FOMAML": Call(algorithms.FOMAML, dict),
    "MAML": Call(algorithms.MAML, dict),
    "named": Call(algorithms.named, lambda: {"algorithm": algorithms.MAML()}),
    "algorithm_of": Call(algorithms.algorithm_of, lambda: {"given": "maml"}),
    "Accuracy": Call(Accuracy, lambda: {"fractions": TWO, "num_skipped": 0}),
    "Estimate": Call(Estimate, lambda: {"mean": 0.9, "interval": 0.1}),
    "Episodes": Call(
        Episodes,
        lambda: {
            **{"data": data(), "num_ways": 2, "num_shots": 1, "num_queries": 1},
            **{"batch_size": 2, "device": "cpu"},
        },
    ),
    "Episodes.sample": Call(lambda: episodes().sample(), dict),
    "Episodes.sample_batch": Call(
        lambda **given: episodes().sample_batch(**given), lambda: {"num_tasks": 2}
    ),
    "Episodes.load_state_dict": Call(
        lambda **given: episodes().load_state_dict(**given),
        lambda: {"state": episodes().state_dict()},
    ),
    "LabelledData": Call(
        LabelledData,
        lambda: {"inputs": torch.rand(3, 2), "classes": ["a", "b"], "counts": [1, 2]},
    ),
    "LabelledData.take": Call(
        lambda **given: data().take(**given),
        lambda: {"class_index": torch.tensor([0, 1]), "example_index": torch.tensor([1, 0])},
    ),
    "LabelledData.split": Call(
        lambda size, **given: data().split(size, 1, **given), lambda: {"size": 2, "seed": 0}
    ),
    "LabelledData.subset": Call(
        lambda **given: data().subset(**given), lambda: {"classes": ["0", "1"]}
    ),
    "LabelledData.to": Call(lambda **given: data().to(**given), lambda: {"device": "cpu"}),
    "LabelledData.rotated": Call(lambda: data().rotated(), dict),
    "Splits": Call(
        Splits, lambda: dict(zip(("train", "validation", "test"), parts(), strict=True))
    ),
    "accuracy": Call(
        fewshot.accuracy,
        lambda: {"koi": classifier(), "episodes": episodes(), **SHORT},
    ),
    "labelled": Call(
        labelled,
        lambda: {
            **{"source": folder(), "input_column": None, "label_column": None, "image_size": 4},
            **{"mode": "L", "max_bytes": 1000, "max_pixels": 99},
        },
    ),
    "labelled pair": Call(
        lambda inputs, labels: labelled((inputs, labels)),
        lambda: {"inputs": torch.rand(4, 2), "labels": [0, 1, 0, 1]},
    ),
    "Lines": Call(Lines, lambda: {"num_points": 10, "batch_size": 2}),
    "Lines.sample_batch": Call(
        lambda **given: Lines().sample_batch(**given), lambda: {"num_tasks": 2}
    ),
    "Sines": Call(Sines, lambda: {"num_points": 10, "batch_size": 2}),
    "Sines.sample_batch": Call(
        lambda **given: Sines().sample_batch(**given), lambda: {"num_tasks": 2}
    ),
    "mini_imagenet.load": Call(
        mini_imagenet.load, lambda: {"source": folder(), "skip_missing": False}
    ),
    "omniglot.load": Call(
        omniglot.load,
        lambda: {
            **{"source": folder(), "num_validation": 10, "seed": 0, "image_size": 28},
            "cache": folder(),
        },
    ),
    "omniglot.characters": Call(
        omniglot.characters, lambda: {"source": folder(), "image_size": 28, "cache": folder()}
    ),
    "sine_mlp": Call(models.sine_mlp, dict),
    "omniglot_net": Call(models.omniglot_net, lambda: {"num_classes": 3, "torch_defaults": False}),
    "mini_imagenet_net": Call(models.mini_imagenet_net, lambda: {"num_classes": 3}),
    "Adaptation": Call(recipes.Adaptation, lambda: {"batch_size": 3, "num_steps": 2}),
    "FewShotRecipe": Call(recipes.FewShotRecipe, of_a_recipe),
    "FewShotRecipe.from_data": Call(
        recipes.FewShotRecipe.from_data, lambda: {"data": recipe().as_data()}
    ),
    "FewShotRecipe.adaptation": Call(
        lambda **given: recipe().adaptation(**given), lambda: {"num_shots": 1}
    ),
    "FewShotRecipe.training_episodes": Call(
        lambda **given: dataclasses.replace(recipe(), num_ways=2, num_shots=1).training_episodes(
            **given
        ),
        lambda: {"data": data(), "device": "cpu"},
    ),
    "FewShotRecipe.test_episodes": Call(
        lambda **given: dataclasses.replace(recipe(), num_ways=2).test_episodes(**given),
        lambda: {"data": data(), "num_shots": 1, "device": "cpu"},
    ),
    "Recipe": Call(
        recipes.Recipe,
        lambda: {
            **{"model": models.sine_mlp, "settings": {}, "tasks": Sines(), "new_tasks": Sines()},
            "num_new_steps": 3,
        },
    ),
    "recipe_named": Call(recipes.recipe_named, lambda: {"name": "omniglot-5way"}),
    "own_folder": Call(
        recipes.own_folder,
        lambda: {
            **{"folder": folder(), "num_ways": 2, "num_shots": 1, "network": "omniglot"},
            "seed": 0,
        },
    ),
    "sine": Call(recipes.sine, lambda: {"num_iterations": 3}),
    "Wave": Call(plots.Wave, lambda: vars(wave())),
    "adaptation_curves": Call(
        plots.adaptation_curves, lambda: {"curves": {"a": evaluation()}, "ylabel": "loss"}
    ),
    "episode_grid": Call(plots.episode_grid, an_episode),
    "learning_curve": Call(
        plots.learning_curve,
        lambda: {
            "validations": [{"iteration": 1, "1-shot inductive": 0.5}],
            "results": {1: RESULT},
        },
    ),
    "loss_curve": Call(plots.loss_curve, lambda: {"history": trained().history}),
    "sine_figure": Call(
        plots.sine_figure,
        lambda: {"waves": {"a": wave()}, "curves": {"a": evaluation()}},
    ),
    "plots.save": Call(
        plots.save, lambda: {"figure": plots.loss_curve(trained().history), "path": "a.svg"}
    ),
    "model_card": Call(
        model_card,
        lambda: {"config": card(), "results": [{"task": "1", "metric": "mse", "value": 0.5}]},
    ),
    "logs.append": Call(
        append, lambda: {"path": Path("lines.jsonl"), "line": {"iteration": 3, "loss": 0.1}}
    ),
}


def parts() -> tuple[LabelledData, ...]:
    return data().split(2, 1, 1)


def classifier() -> Koi:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    return Koi(net, step_size=0.01, num_steps=1, num_iterations=1)


# What no argument, or hardly any, was meant to be. A callable that takes nothing, where one is
# called with something, is a TypeError of Python's own.
WRONG = [
    *(None, True, False, -1, 0, 1, 3, 10**30, -(10**30), 0.5, 1e308, math.nan, math.inf, 1j),
    *("", "x", "\0", "é\x1b[31m", b"x", Path("nowhere"), Ellipsis, NotImplemented, object()),
    *([], [5], ["x", "x"], (), (1, 2, 3), {}, {"a": 1}, {1: "x"}, {5}, range(3), nn.Linear, int),
    *(len, lambda: None, lambda *args, **more: None, lambda *args, **more: "x", nn.Identity()),
    *(np.float64(0.5), np.ones(2), torch.tensor(1.0), torch.ones(2), torch.zeros(0)),
    *(torch.ones(2, 2), torch.tensor([1 + 1j]), torch.float32, torch.device("meta")),
]


def raw(place: tuple[str, str], wrong: Any) -> str | None:
    """Call with one wrong argument; return what came that is neither a success nor an answer."""
    name, argument = place
    given = {**CALLS[name].arguments(), argument: wrong}
    try:
        CALLS[name].function(**given)
    except koi.KoiError as error:
        return None if str(error) else f"{place}, {wrong!r}: no words"
    except TypeError as error:
        return None if callable(wrong) else f"{place}, {wrong!r}: {error!r}"
    except Exception as error:
        return f"{place}, {wrong!r}: {error!r}"
    return None


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Let relative paths lead into a new folder, and nothing be downloaded."""
    before, address = Path.cwd(), omniglot_archives.URL
    omniglot_archives.URL = "http://127.0.0.1:9/"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            omniglot_archives.URL = address


with elsewhere():
    PLACES = [(name, argument) for name, call in CALLS.items() for argument in call.arguments()]
