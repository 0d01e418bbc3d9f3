"""Accuracies of a run: on validation classes while it trains, on test classes at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from koi import Koi
from koi.errors import CheckpointError, ConfigurationError, DataError
from koi.fewshot import Accuracy, LabelledData
from koi.fewshot.accuracy import both_ways
from koi.lab.runs.folder import Config, Run
from koi.lab.runs.kinds import CONFIG, RUN, what_is
from koi.settings import Settings
from koi.training import checkpoint
from koi.training.agreement import different_settings

# What can be others where a run is measured: data move, and machines differ.
_PLACES = ("data", "device")
# Tasks that are adapted to at once on a CPU; on a GPU as many as are drawn together.
_CHUNK = 20
# Test tasks for which a graph is made, which takes 15 to 25 seconds. A task of the paper's 50 steps
# then takes 0.04 seconds in the place of 0.17, one of our recipe's 10 a tenth less (one thread).
_WORTH_A_GRAPH = 1000


def measure(
    run: Run,
    num_shots: int,
    num_tasks: int = 1000,
    progress: bool | None = None,
    *,
    compile: bool = False,
) -> Any:
    """Measure the run's chosen checkpoint on test classes, and keep the result in its folder.

    Args:
        run: a run that has trained.
        num_shots: support examples of each class.
        num_tasks: test tasks; the paper takes 10,000.
        progress: whether to show a progress bar; None: where there is a terminal.
        compile: whether the inner loop may be compiled, which is done where there are enough tasks.

    Returns:
        The result as it is kept: both accuracies with their intervals, in [0, 1], and how many
        tasks they are over or were left out as not finite.

    Raises:
        DataError: a test class has too few examples for so many shots.
        CheckpointError: the run has no checkpoint.
    """
    config = run.config()
    run.check_links()
    chosen = chosen_checkpoint(run)
    test = config.splits().test
    _check_shots(test, num_shots)
    began = time.perf_counter()
    learner = measuring_learner(chosen, config, num_shots)
    learner.compile = compile and num_tasks >= _WORTH_A_GRAPH
    found = measured(learner, config, test, num_shots, num_tasks, progress)
    result = {
        "transductive": list(found.transductive),
        "inductive": list(found.inductive),
        "num_tasks": found.num_tasks,
        "num_skipped": found.num_skipped,
        "iteration": learner.iteration,
        "seconds": round(time.perf_counter() - began, 1),
    }
    run.add_result(num_shots, result)
    return result


def _check_shots(test: LabelledData, num_shots: int) -> None:
    """Raise an error that says which numbers of shots there are examples for."""
    count, name = min(zip(test.counts, test.classes, strict=True))
    if count <= num_shots:
        fits = f"take {count - 1}" + (" or fewer" if count > 2 else "") if count > 1 else "add some"
        raise DataError(
            f"{num_shots} shots need {num_shots + 1} examples of each test class, one of them to "
            f"be asked, and {name!r} has {count}: {fits}"
        )


def measuring_learner(path: Path, config: Config, num_shots: int) -> Koi:
    """Return a learner that adapts as the recipe's test tasks want it, from a checkpoint.

    It is not compiled: for a few tasks a graph takes longer than it saves. A task on
    which it diverges is left out and counted: it must not end a training that is being watched.
    """
    recipe = config.recipe
    model, settings = recipe.model().to(config.device), _measuring(config, num_shots)
    return Koi.load(path, model, **recipe.code(), **settings)


def measuring_copy(learner: Koi, config: Config, num_shots: int) -> Koi:
    """Return a learner as `measuring_learner` does, of what ``learner`` is now."""
    copy = Koi(config.recipe.model().to(config.device), **vars(learner.settings))
    copy.load_state_dict(learner.state_dict())
    for name, value in _measuring(config, num_shots).items():
        setattr(copy, name, value)
    return copy


def _measuring(config: Config, num_shots: int) -> dict[str, Any]:
    return {
        "num_steps": config.recipe.adaptation(num_shots).num_steps,
        "compile": False,
        "vectorize": "auto",
        "chunk_size": _CHUNK if config.device == "cpu" else None,
        "on_nonfinite": "skip",
    }


def measured(
    learner: Koi,
    config: Config,
    data: LabelledData,
    num_shots: int,
    num_tasks: int,
    progress: bool | None = False,
) -> Accuracy:
    """Return the accuracies on episodes of ``data``."""
    episodes = config.recipe.test_episodes(data, num_shots, config.device)
    hidden = None if progress is None else not progress
    with tqdm(total=num_tasks, unit="task", disable=hidden, dynamic_ncols=True) as bar:
        bar.set_description(f"{num_shots}-shot")

        def metric(model: nn.Module, task: Any) -> Tensor:
            bar.update()
            return both_ways(model, task)

        fractions = learner.measure(episodes, metric, num_tasks)
    return Accuracy(fractions, num_tasks - len(fractions))


def chosen_checkpoint(run: Run) -> Path:
    """Return the file of the φ by which a run is measured and used.

    That is the best by validation where the training keeps it, as on a folder of one's own; else
    the last.

    Raises:
        CheckpointError: there is none.
        ConfigurationError: it was trained by another configuration.
    """
    best = run.checkpoints / "best.safetensors"
    chosen = best if best.exists() else newest_checkpoint(run)
    _check_settings(run, chosen)
    return chosen


def _check_settings(run: Run, path: Path) -> None:
    """Check that the configuration is still that by which a checkpoint was trained.

    Raises:
        ConfigurationError: it says something else, as a card would then.
    """
    config, saved = run.config(), checkpoint.read(path)
    given = config.recipe.settings() | {"seed": config.seed, "compile": config.compile}
    problems = [*different_settings(saved.settings, Settings(**given).stored())]
    if not problems and isinstance(saved.mark.tasks, dict) and "config" in saved.mark.tasks:
        problems = _edited(saved.mark.tasks["config"], config)
    if problems:
        raise ConfigurationError(
            [
                *(f"{run.folder / CONFIG}: {each}" for each in problems),
                "put it back as it was, or train anew elsewhere",
            ]
        )


def _edited(there: Any, here: Config) -> list[str]:
    """Return what differs from the configuration that was trained with, but for where it ran."""
    try:
        before = Config.from_data(json.loads(there)).flat()
    except (RecursionError, TypeError, ValueError) as error:  # Koi's own are ValueErrors, too
        return [f"the checkpoint holds no configuration ({error})"]
    now = here.flat()
    return [
        f"{name}: {before[name]!r} in the checkpoint, {now[name]!r} here"
        for name in now
        if name not in _PLACES and before[name] != now[name]
    ]


def newest_checkpoint(run: Run) -> Path:
    """Return the file of the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted(run.checkpoints.glob("iteration-*.safetensors"))
    if found:
        return found[-1]
    what = what_is(run.folder)
    if what != RUN:
        raise CheckpointError(f"{run.folder} is {what}: give {RUN}, which koi train makes")
    raise CheckpointError(f"{run.folder} has no checkpoint yet: train it first, by koi train")
