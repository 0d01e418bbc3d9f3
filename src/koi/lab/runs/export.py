"""A run as one small file to adapt from."""

from __future__ import annotations

from pathlib import Path

from koi import Koi, storage
from koi.lab.runs.folder import Run
from koi.lab.runs.measuring import chosen_checkpoint


def export(run: Run, path: Path) -> int:
    """Write a run's learner for `koi.Koi.load`: φ, the inner optimizer's moments, settings.

    What only going on with the training needs is left out: history, class names, meta-optimizer.

    Args:
        run: a run that has trained.
        path: the file.

    Returns:
        How many meta-iterations it has behind it.

    Raises:
        CheckpointError: the run has no checkpoint, or the file cannot be written.
    """
    recipe = run.config().recipe
    code = recipe.code() | {"meta_optimizer": None}
    learner = Koi.load(chosen_checkpoint(run), recipe.model(), **code)
    learner.history.clear()
    only_training = {"tasks": None, "generators": None, "drawn_seed": None}
    storage.write(path, learner.state_dict() | only_training)
    return learner.iteration
