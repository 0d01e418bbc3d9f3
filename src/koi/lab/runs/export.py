"""A run as one small file to adapt from."""

from __future__ import annotations

from pathlib import Path

from koi import Koi, storage
from koi.lab.runs.folder import Run
from koi.lab.runs.kinds import RUN, what_is
from koi.lab.runs.measuring import chosen_checkpoint
from koi.recipes import FewShotRecipe

RECIPE = "recipe"


def export(run: Run, path: Path) -> int:
    """Write a run's learner for `koi.Koi.load`: φ, the inner optimizer's moments, settings.

    What only going on with the training needs is left out: history, class names, meta-optimizer.
    The recipe is added, which says what no checkpoint knows of the network: BatchNorm's ε.

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
    names = ("tasks", "callbacks", "generators", "drawn_seed", "best", "owed")
    only_training = dict.fromkeys(names)
    storage.write(path, learner.state_dict() | only_training | {RECIPE: recipe.as_data()})
    return learner.iteration


def recipe_of(file: Path) -> FewShotRecipe | None:
    """Return the recipe by which a learner was trained, of a file that `export` wrote.

    Of a checkpoint it is that of the run in whose folder it lies; None: nothing says it.
    """
    stored = storage.read(file).get(RECIPE)
    if stored is not None:
        return FewShotRecipe.from_data(stored)
    folder = file.absolute().parent.parent
    return Run(folder).config().recipe if what_is(folder) == RUN else None
