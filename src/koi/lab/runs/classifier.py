"""A classifier of images: a run's network, adapted to a few images of each of some classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

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
from koi.lab.runs.kinds import CLASSIFIER, RUN, what_is
from koi.lab.runs.measuring import chosen_checkpoint, measuring_learner
from koi.recipes import IMAGE_FORMS, NETWORKS

_WANTED = "give a file that koi adapt wrote"


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
        torch_defaults: as in `koi.recipes.FewShotRecipe`.
    """

    network: str
    classes: tuple[str, ...]
    model: nn.Module
    support: Tensor
    torch_defaults: bool = False

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
        names = ("network", "classes", "support", "torch_defaults")
        data = {name: getattr(self, name) for name in names}
        storage.write(Path(path), {"classifier": data, "weights": weights})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Return the classifier that `save` wrote. Nothing in the file is executed.

        Raises:
            CheckpointError: the file cannot be read, or holds something else.
        """
        what = what_is(Path(path))
        if what != CLASSIFIER:
            adapting = f"adapt it first, by koi adapt {quote(str(path))} SUPPORT_FOLDER"
            mend = adapting if what == RUN else _WANTED
            raise CheckpointError(f"{path} is {what}: {mend}")
        data = storage.read(Path(path))
        try:
            return _from_file(data["classifier"], data["weights"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} holds no classifier ({type(error).__name__}: {error}): {_WANTED}"
            ) from error


def _from_file(kept: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Classifier:
    """Return the classifier of what a file holds, of which nothing is believed.

    The network is made without memory of its own, and compared with the weights that there are:
    a forged number of outputs makes it no larger than the file.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    network, classes, support = kept["network"], tuple(kept["classes"]), kept["support"]
    names_are_text = all(isinstance(name, str) for name in classes)
    if not names_are_text or len(set(classes)) < len(classes) or len(classes) < 2:
        raise ValueError("classes must be names, at least two, each once")
    num_outputs = len(list(weights.values())[-1])
    more = {"torch_defaults": True} if kept.get("torch_defaults") is True else {}
    with torch.device("meta"):
        model = NETWORKS[network](num_outputs, **more)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ValueError(f"weights are not those of the network {network!r}")
    if any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError("weights must be of type float32")
    if len(classes) > num_outputs:
        raise ValueError(f"classes are more than the network's {num_outputs} outputs")
    form = IMAGE_FORMS[network]
    shape = (len(form.mode), form.size, form.size)
    if support.dtype != torch.uint8 or support.shape[1:] != shape or not len(support):
        raise ValueError(f"support must have shape (num_images, {', '.join(map(str, shape))})")
    model.load_state_dict(weights, assign=True)
    return Classifier(network, classes, model, support, bool(more))


def adapt(run: Run, folder: str | os.PathLike[str], num_steps: int | None = None) -> Classifier:
    """Return a classifier of the classes in a folder, adapted from the run's chosen checkpoint.

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
    checkpoint = chosen_checkpoint(run)
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
    return Classifier(recipe.network, tuple(files), model, support, recipe.torch_defaults)


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
