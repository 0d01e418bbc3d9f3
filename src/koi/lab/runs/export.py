"""A run as one small file to adapt from."""

from __future__ import annotations

from pathlib import Path

from koi import Koi
from koi.lab.runs.folder import Run
from koi.lab.runs.measuring import newest_checkpoint
from koi.training import checkpoint
from koi.training.checkpoint import Mark


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
    learner = Koi.load(newest_checkpoint(run), recipe.model(), **code)
    learner.history.clear()
    checkpoint.save(learner, path, Mark(tasks=None, generators=None))
    return learner.iteration
