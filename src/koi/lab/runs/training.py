"""Training a recipe in a folder, with its accuracy on validation classes."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from koi import Koi
from koi.fewshot import Accuracy, LabelledData
from koi.lab.runs.folder import Config, Run
from koi.lab.runs.measuring import measured, measuring_copy
from koi.training.logs import append
from koi.training.progress import ProgressBar

# Of a whole training; a validation takes as long as many meta-iterations, hence the least distance.
_NUM_CHECKPOINTS = 100
_NUM_VALIDATIONS = 10
_LEAST_DISTANCE = 250
_VALIDATION_TASKS = 50


def train(run: Run, progress: bool | None = None) -> Koi:
    """Train the run's recipe, from where an earlier training of the folder was stopped.

    The folder gets checkpoints, metrics.jsonl with a line for each meta-iteration,
    validation.jsonl, and at the end the weights at φ, which load without Koi. Test classes are
    not looked at.

    Args:
        run: a run, begun or trained in part.
        progress: whether to show a progress bar; None: where there is a terminal.
    """
    config = run.config()
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
    with ProgressBar(progress, recipe.num_iterations, 0) as bar:
        watches = len(splits.validation) >= recipe.num_ways
        learner.train(
            recipe.training_episodes(splits.train, config.device),
            progress=False,
            callbacks=[lambda _, record: bar.advance(record)],
            checkpoint_dir=run.checkpoints,
            checkpoint_every=every,
            resume=True,
            log_dir=run.folder,
            validate=Validation(run, config, splits.validation, bar) if watches else None,
            validate_every=max(_LEAST_DISTANCE, recipe.num_iterations // _NUM_VALIDATIONS),
            # the paper's numbers are those of the last φ
            keep_best=recipe.problem == "folder",
        )
    safetensors.torch.save_model(learner.model, str(run.weights))
    return learner


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
                _VALIDATION_TASKS,
            )
            for num_shots in config.recipe.adaptations
        }
