"""Training a recipe in a folder, with its accuracy on validation classes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from koi import Koi, Record
from koi.fewshot import Accuracy, Episodes, LabelledData
from koi.lab.runs.folder import Config, Run
from koi.lab.runs.measuring import measured, measuring_copy
from koi.recipes import FewShotRecipe
from koi.training.logs import append
from koi.training.progress import ProgressBar

# Of a whole training; a validation takes as long as many meta-iterations, hence the least distance.
_NUM_CHECKPOINTS = 100
_NUM_VALIDATIONS = 10
_LEAST_DISTANCE = 250
_VALIDATION_TASKS = 50
# Where validation decides when training ends: then it is not a tenth of what there is at most.
_DISTANCE_OF_PATIENCE = 500
_TASKS_OF_PATIENCE = 100
# Meta-iterations after which it is said how long the rest will take.
_NUM_TIMED = 10


def train(
    run: Run, progress: bool | None = None, say: Callable[[str], object] | None = None
) -> Koi:
    """Train the run's recipe, from where an earlier training of the folder was stopped.

    The folder gets checkpoints, metrics.jsonl with a line for each meta-iteration,
    validation.jsonl, and at the end the weights at φ, which load without Koi. Test classes are
    not looked at.

    Args:
        run: a run, begun or trained in part.
        progress: whether to show a progress bar; None: where there is a terminal.
        say: is told after a few meta-iterations how long the rest will take; None: nothing is.
    """
    config = run.config()
    run.check_links()
    recipe = config.recipe
    splits = config.splits()
    torch.manual_seed(config.seed)
    learner = Koi(
        recipe.model().to(config.device),
        **recipe.settings(),
        seed=config.seed,
        compile=config.compile,
    )
    every = max(1, recipe.num_iterations // _NUM_CHECKPOINTS)
    callbacks = [] if say is None else [Forecast(recipe, say)]
    with ProgressBar(progress, recipe.num_iterations, 0) as bar:
        watches = len(splits.validation) >= recipe.num_ways
        distance = max(_LEAST_DISTANCE, recipe.num_iterations // _NUM_VALIDATIONS)
        learner.train(
            Tasks(recipe.training_episodes(splits.train, config.device), config),
            progress=False,
            callbacks=[lambda _, record: bar.advance(record), *callbacks],
            checkpoint_dir=run.checkpoints,
            checkpoint_every=every,
            resume=True,
            log_dir=run.folder,
            validate=Validation(run, config, splits.validation, bar) if watches else None,
            validate_every=_DISTANCE_OF_PATIENCE if recipe.patience else distance,
            # the paper's numbers are those of the last φ
            keep_best=recipe.problem == "folder",
            patience=recipe.patience if watches else None,
        )
    safetensors.torch.save_model(learner.model, str(run.weights))
    return learner


class Tasks:
    """The episodes that a run learns from; a checkpoint keeps the configuration with their classes.

    With it `koi.lab.runs.measuring` sees whether config.json is still that of the training.

    Args:
        episodes: of the training classes.
        config: the run's.
    """

    def __init__(self, episodes: Episodes, config: Config) -> None:
        self._episodes, self._config = episodes, config

    def sample(self) -> Any:
        """Draw one episode."""
        return self._episodes.sample()

    @property
    def sample_batch(self) -> Any:
        """As that of the episodes."""
        return self._episodes.sample_batch

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {**self._episodes.state_dict(), "config": json.dumps(self._config.as_data())}

    def load_state_dict(self, state: Any) -> None:
        """Check that a checkpoint was made with these classes.

        Raises:
            CheckpointError: it was made with others.
        """
        self._episodes.load_state_dict(state)


class Forecast:
    """Says once, after a few meta-iterations, how long the rest of a training will take.

    Args:
        recipe: what is trained.
        say: is told.
    """

    def __init__(self, recipe: FewShotRecipe, say: Callable[[str], object]) -> None:
        self._recipe, self._say = recipe, say
        self._seconds: list[float] = []

    def __call__(self, koi: Koi, record: Record) -> None:
        """Time a meta-iteration; the first ones may compile and check, hence the median."""
        if len(self._seconds) == _NUM_TIMED:
            return
        self._seconds.append(record.seconds)
        left = self._recipe.num_iterations - koi.iteration
        if len(self._seconds) == _NUM_TIMED and left > 0:
            each = statistics.median(self._seconds)
            most = "at most, " if self._recipe.patience else ""
            self._say(
                f"The other {left:,} meta-iterations will take about {duration(each * left)} "
                f"({most}{each:.2g} s each, validation aside)"
            )


def duration(seconds: float) -> str:
    """Return a length of time for people.

    >>> [duration(s) for s in (1, 50, 100, 29_000, 600_000)]
    ['1 second', '50 seconds', '2 minutes', '8 hours', '7 days']
    """
    units = ("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400)
    name, size = next((unit for unit in reversed(units) if seconds >= 1.5 * unit[1]), units[0])
    count = max(1, round(seconds / size))
    return f"{count} {name}" + "s" * (count > 1)


class Validation:
    """Measures accuracy on validation classes, as one minus which a training is judged.

    The measured learner is a copy: it adapts in its own way and many tasks at once, and cannot
    touch the training.
    """

    def __init__(self, run: Run, config: Config, data: LabelledData, bar: ProgressBar) -> None:
        self._run = run
        self._config = config
        self._data = data
        self._bar = bar

    def __call__(self, koi: Koi) -> float:
        """Measure and keep the accuracies; return the error rate of the fewest shots."""
        line: dict[str, Any] = {"iteration": koi.iteration}
        for num_shots, found in self._accuracies(koi).items():
            line[f"{num_shots}-shot transductive"] = found.transductive.mean
            line[f"{num_shots}-shot inductive"] = found.inductive.mean
            line[f"{num_shots}-shot num_skipped"] = found.num_skipped
        append(self._run.validation, line)
        right: float = line[f"{min(self._config.recipe.adaptations)}-shot inductive"]
        self._bar.note = f"validation {100 * right:.1f} %"
        return 1 - right

    def _accuracies(self, koi: Koi) -> dict[int, Accuracy]:
        config = self._config
        return {
            num_shots: measured(
                measuring_copy(koi, config, num_shots),
                config,
                self._data,
                num_shots,
                _TASKS_OF_PATIENCE if config.recipe.patience else _VALIDATION_TASKS,
            )
            for num_shots in config.recipe.adaptations
        }
