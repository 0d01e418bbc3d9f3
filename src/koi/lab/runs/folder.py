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

from koi import allowed
from koi.errors import ConfigurationError
from koi.fewshot import Splits, labelled
from koi.files import content_of, mend, replace_file
from koi.lab.runs import schema
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

    recipe: FewShotRecipe = allowed.of(allowed.instance(FewShotRecipe, "a recipe"))
    data: str | None = allowed.of(allowed.optional(allowed.path), None)
    seed: int = allowed.of(allowed.count(0, most=2**64), 0)
    num_validation: int = allowed.of(allowed.count(0), 100)
    compile: bool = allowed.of(allowed.truth, False)
    device: str = allowed.of(allowed.device, "cpu")
    classes: Parts | None = allowed.of(allowed.optional(schema.parts), None)

    def __post_init__(self) -> None:
        allowed.check_fields(self)

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
        """Return the configuration that `as_data` was given.

        Raises:
            ConfigurationError: a field is missing, unknown or cannot be what it is.
        """
        given = dict(data)
        if "recipe" in given:
            given["recipe"] = FewShotRecipe.from_data(given["recipe"])
        return allowed.made(cls, given)


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
        data = self._described()
        data.pop("made_with", None)
        try:
            return Config.from_data(data)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{self._config}: {problem}; {schema.MEND}" for problem in error.problems
            ) from error

    def environment(self) -> dict[str, str]:
        """Return what the run was made with."""
        made_with = self._described().get("made_with")
        words = isinstance(made_with, dict) and all(
            isinstance(value, str) for value in made_with.values()
        )
        if not words or not isinstance(made_with, dict):
            raise ConfigurationError([f"{self._config}: made_with is no dictionary of words"])
        return made_with

    def _described(self) -> dict[str, Any]:
        """Return what config.json holds.

        Raises:
            ConfigurationError: the folder holds no run.
        """
        try:
            return schema.read(self._config)
        except OSError as error:
            raise ConfigurationError(
                [
                    f"{self.folder} is {what_is(self.folder)}: give the folder of a run, which "
                    "koi train makes"
                ]
            ) from error

    def check_links(self) -> None:
        """Check that nothing here leads elsewhere, where Koi would then write.

        Raises:
            ConfigurationError: a link lies in the folder, or among its checkpoints.
        """
        for folder in (self.folder, self.checkpoints):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_symlink():
                    raise ConfigurationError(
                        [
                            f"{path} is a link, and Koi writes through none in a run's folder: "
                            "put the file itself there, or make the whole folder a link"
                        ]
                    )

    def results(self) -> dict[int, Any]:
        """Return what `koi.lab.runs.measure` found: number of shots -> accuracies."""
        if not self._results.exists():
            return {}
        results = {}
        try:
            for shots, found in schema.read(self._results).items():
                allowed.check(shots=(shots, schema.shots))
                results[int(shots)] = vars(
                    allowed.made(schema.Result, found, f"of {shots} shots, ")
                )
        except (ConfigurationError, OSError) as error:
            problem = "; ".join(getattr(error, "problems", [str(error)]))
            raise ConfigurationError(
                [f"{self._results}: {problem}; put it back as it was, or measure without the file"]
            ) from error
        return results

    def add_result(self, num_shots: int, result: Mapping[str, Any]) -> None:
        """Keep the result for a number of shots, in the place of an earlier one."""
        results = self.results() | {num_shots: dict(result)}
        self._write(self._results, {str(k): results[k] for k in sorted(results)})

    def validations(self) -> list[dict[str, Any]]:
        """Return the accuracies that were measured during the training."""
        if not self.validation.exists():
            return []
        lines = []
        try:
            for text in content_of(self.validation, 16 * schema.MAX_BYTES).splitlines():
                line = json.loads(text)
                allowed.check(line=(line, schema.measured))
                lines.append(line)
        except (ConfigurationError, OSError, RecursionError, ValueError) as error:
            raise ConfigurationError(
                [f"{self.validation}: line {len(lines) + 1} is no measurement; take it out"]
            ) from error
        return lines

    def _write(self, path: Path, data: Mapping[str, Any]) -> None:
        self.check_links()
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        # what is no UTF-8 in a name becomes JSON's own escape of it
        replace_file(path, text.encode(errors="backslashreplace"))


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
