"""The folder of a run, and what it remembers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from koi.errors import ConfigurationError
from koi.fewshot import Splits, labelled
from koi.files import mend, replace_file
from koi.lab.runs.kinds import CONFIG, what_is
from koi.problems import mini_imagenet, omniglot
from koi.recipes import IMAGE_FORMS, FewShotRecipe, Parts
from koi.training.logs import METRICS


@dataclass(frozen=True)
class Config:
    """All that makes a run what it is, and where it was made.

    Args:
        recipe: the experiment, its meta-iterations those of this run.
        data: where the data are; None: downloaded.
        seed: of the initial weights, the split into classes and the tasks.
        num_validation: training characters of Omniglot set apart to watch the training by.
        compile: whether the inner loop is compiled.
        device: "cpu", "cuda" …
        classes: of a folder of one's own, the classes of each part.
    """

    recipe: FewShotRecipe
    data: str | None = None
    seed: int = 0
    num_validation: int = 100
    compile: bool = False
    device: str = "cpu"
    classes: Parts | None = None

    def splits(self) -> Splits:
        """Return the data in three parts."""
        if self.recipe.problem == "omniglot":
            return omniglot.load(self.data, num_validation=self.num_validation, seed=self.seed)
        if self.data is None:
            raise ConfigurationError(
                [f"the data of {self.recipe.name} cannot be downloaded: give them by --data"]
            )
        if self.classes is None:
            return mini_imagenet.load(self.data)
        form = IMAGE_FORMS[self.recipe.network]
        data = labelled(self.data, image_size=form.size, mode=form.mode)
        return Splits(**{part: data.subset(names) for part, names in self.classes.items()})

    def as_data(self) -> dict[str, Any]:
        """Return the configuration as JSON can hold it."""
        return {**asdict(self), "recipe": self.recipe.as_data()}

    def flat(self) -> dict[str, Any]:
        """Return the configuration with the recipe's fields among its own."""
        data = self.as_data()
        return {**data.pop("recipe"), **data}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Config:
        """Return the configuration that `as_data` was given."""
        return cls(**{**data, "recipe": FewShotRecipe.from_data(data["recipe"])})


class Run:
    """A folder with a configuration, checkpoints, curves and results.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.validation = self.folder / "validation.jsonl"
        self.picture = self.folder / "learning-curve.png"
        self.weights = self.folder / "model.safetensors"
        self.learner = self.folder / "learner.safetensors"
        self._config = self.folder / CONFIG
        self._results = self.folder / "results.json"

    @classmethod
    def begun(cls, folder: str | os.PathLike[str], config: Config) -> Run:
        """Return the run in ``folder``, begun now or earlier with the same configuration.

        Raises:
            ConfigurationError: the folder is another run's, or cannot be made.
        """
        run = cls(folder)
        if run._config.exists():
            problems = _differences(run.config(), config)
            if problems and run.is_trained:
                raise ConfigurationError(
                    [
                        f"{folder} holds another run ({'; '.join(problems)}): choose another "
                        "folder by --out, or go on as it began"
                    ]
                )
            if not problems:
                return run
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run._write(run._config, {**config.as_data(), "made_with": environment(config.device)})
        except OSError as error:
            raise ConfigurationError(
                [f"the folder {folder} cannot be made ({error.strerror or error}): {mend(error)}"]
            ) from error
        return run

    @property
    def is_trained(self) -> bool:
        """Whether a meta-iteration was ever done here: a folder without one is nobody's run."""
        metrics = self.folder / METRICS
        has_lines = metrics.is_file() and metrics.stat().st_size > 0
        return has_lines or any(self.checkpoints.glob("iteration-*.safetensors"))

    def config(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigurationError: the folder holds no run.
        """
        try:
            data = json.loads(self._config.read_text(encoding="utf-8"))
            data.pop("made_with")
            return Config.from_data(data)
        except OSError as error:
            raise ConfigurationError(
                [
                    f"{self.folder} is {what_is(self.folder)}: give the folder of a run, which "
                    "koi train makes"
                ]
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                [
                    f"{self.folder} is no folder of a run ({type(error).__name__}: {error}): give "
                    "one that koi train made"
                ]
            ) from error

    def environment(self) -> dict[str, str]:
        """Return what the run was made with."""
        made_with: dict[str, str] = json.loads(self._config.read_text(encoding="utf-8"))[
            "made_with"
        ]
        return made_with

    def results(self) -> dict[int, Any]:
        """Return what `koi.lab.runs.measure` found: number of shots -> accuracies."""
        if not self._results.exists():
            return {}
        found = json.loads(self._results.read_text(encoding="utf-8"))
        return {int(shots): result for shots, result in found.items()}

    def add_result(self, num_shots: int, result: Mapping[str, Any]) -> None:
        """Keep the result for a number of shots, in the place of an earlier one."""
        results = self.results() | {num_shots: dict(result)}
        self._write(self._results, {str(k): results[k] for k in sorted(results)})

    def validations(self) -> list[dict[str, Any]]:
        """Return the accuracies that were measured during the training."""
        if not self.validation.exists():
            return []
        lines = self.validation.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @staticmethod
    def _write(path: Path, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        replace_file(path, text.encode())


# What was typed to set a value; all else follows from these and from the data.
_TYPED = {
    "num_iterations": "--iterations",
    "num_ways": "--ways",
    "network": "--network",
    "data": "--data",
    "seed": "--seed",
    "num_validation": "--validation",
    "compile": "--compile",
    "device": "--device",
}


def _differences(there: Config, here: Config) -> list[str]:
    """Return what differs, by what was typed where that says it all."""
    old, new = there.flat(), here.flat()
    differ = [name for name in new if old[name] != new[name]]
    if there.recipe.name != here.recipe.name and not (there.classes and here.classes):
        return [f"recipe {there.recipe.name} there, {here.recipe.name} here"]
    lines = [f"{_TYPED[n]} {old[n]} there, {new[n]} here" for n in differ if n in _TYPED]
    shots = [", ".join(config.recipe.as_data()["adaptations"]) for config in (there, here)]
    if shots[0] != shots[1]:
        lines.append(f"--shots {shots[0]} there, {shots[1]} here")
    if not lines and {"classes", "num_shots"} & set(differ):
        lines = ["the images in the folder have changed since"]
    return lines or [f"{name} {old[name]} there, {new[name]} here" for name in differ]


def environment(device: str) -> dict[str, str]:
    """Return the versions and the hardware that a result made on ``device`` belongs to."""
    return {
        "koi": version("koi-x"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(torch.device(device)),
        "threads": str(torch.get_num_threads()),
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
