"""A classifier of images: a run's network, adapted to a few images of each of some classes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi import SupervisedTask, storage
from koi.errors import CheckpointError, DataError
from koi.fewshot.accuracy import inductive_scores
from koi.fewshot.data import scaled
from koi.fewshot.images import ImageForm
from koi.fewshot.sources import class_folders
from koi.lab.runs.folder import Run
from koi.lab.runs.measuring import measuring_learner, newest_checkpoint
from koi.recipes import IMAGE_FORMS, NETWORKS


@dataclass(frozen=True)
class Classifier:
    """Says of each image what the probability of each class is.

    An image is classified in a forward of its own, together with the images that were adapted to,
    as the network normalises by the batch at hand: what is said of an image depends on no other
    new image (the *inductive* rows of the paper's tables).

    Args:
        network: one of `koi.recipes.NETWORKS`.
        classes: the names of its first outputs; it can have more, which are not looked at.
        model: the adapted network, on the CPU.
        support: what it was adapted to, shape (num_images, channels, height, width), uint8.
    """

    network: str
    classes: tuple[str, ...]
    model: nn.Module
    support: Tensor

    @property
    def image_form(self) -> ImageForm:
        """What an image becomes, to be an input."""
        return IMAGE_FORMS[self.network]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probability of each class.

        Args:
            images: shape (num_images, channels, height, width), of type uint8.

        Returns:
            Shape (num_images, num_classes).
        """
        scores = inductive_scores(self.model, scaled(self.support), scaled(images))
        return scores[:, : len(self.classes)].softmax(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier into one safetensors file, wholly or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        weights = self.model.state_dict()
        data = {"network": self.network, "classes": self.classes, "support": self.support}
        storage.write(Path(path), {"classifier": data, "weights": weights})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Return the classifier that `save` wrote. Nothing in the file is executed.

        Raises:
            CheckpointError: the file cannot be read, or holds something else.
        """
        data = storage.read(Path(path))
        try:
            kept, weights = data["classifier"], data["weights"]
            model = NETWORKS[kept["network"]](len(list(weights.values())[-1]))
            model.load_state_dict(weights)
            return cls(model=model, **kept)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{path} holds no classifier ({type(error).__name__}: {error}): give a file that "
                "koi adapt wrote"
            ) from error


def adapt(run: Run, folder: str | os.PathLike[str], num_steps: int | None = None) -> Classifier:
    """Return a classifier of the classes in a folder, adapted from the run's newest checkpoint.

    Where there are fewer classes than ways, the network's first outputs are theirs and nothing
    looks at the others: outputs are on a par, as episodes number their classes at random.

    Args:
        run: a run that has trained.
        folder: a folder of images for each class: the support set. Classes can have different
            numbers of images.
        num_steps: inner steps; None: as in the recipe's test.

    Raises:
        DataError: the folder cannot be read, or has one class, or more than the network has ways.
        CheckpointError: the run has no checkpoint.
    """
    config = replace(run.config(), device="cpu")
    recipe = config.recipe
    checkpoint = newest_checkpoint(run)
    files = class_folders(Path(folder))
    if not 2 <= len(files) <= recipe.num_ways:
        raise DataError(
            f"{folder} has {len(files)} class{'es' * (len(files) > 1)}, and the network in "
            f"{run.folder} tells from 2 to {recipe.num_ways} apart: give so many, or train one "
            "for more ways"
        )
    form = IMAGE_FORMS[recipe.network]
    support = torch.stack(form.read_all(path for paths in files.values() for path in paths))
    counts = [len(paths) for paths in files.values()]
    learner = measuring_learner(checkpoint, config, min(counts))
    task = _task(support, counts, recipe.adaptation(min(counts)).batch_size, config.seed)
    model = learner.adapt(task, num_steps)
    return Classifier(recipe.network, tuple(files), model, support)


def _task(support: Tensor, counts: list[int], batch_size: int, seed: int) -> SupervisedTask:
    """Return the task of telling the support images' classes, in random order."""
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(seed))
    inputs = scaled(support)[order]
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    return SupervisedTask(
        *(inputs, targets) * 2,
        key=torch.tensor(seed),
        criterion=partial(_loss, len(counts)),
        batch_size=batch_size,
    )


def _loss(num_classes: int, scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores[..., :num_classes], targets)
