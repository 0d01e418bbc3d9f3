"""A run as one small file to adapt from."""

from __future__ import annotations

from pathlib import Path

from koi import Koi, checkpoint
from koi.checkpoint import Mark
from koi.runs.folder import Run
from koi.runs.measuring import newest_checkpoint


def export(run: Run, path: Path) -> None:
    """Write a run's learner for `koi.Koi.load`: φ, the inner optimizer's moments, settings.

    What only going on with the training needs, history and class names, is left out.

    Args:
        run: a run that has trained.
        path: the file.

    Raises:
        CheckpointError: the run has no checkpoint, or the file cannot be written.
    """
    recipe = run.config().recipe
    learner = Koi.load(newest_checkpoint(run), recipe.model(), **recipe.code())
    learner.history.clear()
    checkpoint.save(learner, path, Mark(tasks=None, generators=None))
