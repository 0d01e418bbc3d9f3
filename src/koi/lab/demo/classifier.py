"""A meta-learned network that adapts to a handful of drawings and says what a new one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koi import Koi
from koi.algorithms import algorithm_of
from koi.errors import CheckpointError
from koi.lab.demo.calibration import Reading, Readings, readings_of, signs
from koi.lab.runs.export import recipe_of
from koi.lab.runs.folder import Run
from koi.lab.runs.kinds import LEARNER, what_is
from koi.lab.runs.measuring import chosen_checkpoint
from koi.models import omniglot_net
from koi.randomness import preserved_generators, set_generators
from koi.recipes.fewshot import adam_without_momentum
from koi.training import checkpoint

MIN_CLASSES, MAX_CLASSES = 3, 5
SHIPPED = Path(__file__).parent / "omniglot-5way-koi.safetensors"


@dataclass(frozen=True)
class Answer:
    """What came of an adaptation, before the first step and after each.

    Args:
        losses: cross entropy on the examples, num_steps + 1 numbers.
        probabilities: of the new drawing, by class, given that it is of one of them, num_steps + 1
            rows; none without a drawing.
        known: the probability that it is of one of them, num_steps + 1 numbers; none where that was
            not calibrated.
    """

    losses: list[float]
    probabilities: list[list[float]]
    known: list[float]


class Examples:
    """A task of one image of each class, which notes at every step what the network thinks.

    A network of more outputs than classes is read at its first ``num_classes``, in the loss as
    in the answer. In the episodes it was trained on, labels were given out at random, so its
    outputs are on a par; and as nothing else enters the loss, the gradient leaves the weights of
    the other outputs alone: what adapts is the network with the rows of its last layer cut off.

    Args:
        images: shape (num_classes, 1, 28, 28).
        query: an image of shape (1, 28, 28), or None.
        readings: how scores are read at each step; none: as a softmax has them.
    """

    def __init__(
        self, images: Tensor, query: Tensor | None, readings: Sequence[Reading] = ()
    ) -> None:
        self.images = images
        self.query = query
        self.answer = Answer([], [], [])
        self._readings = iter(readings)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the cross entropy on the examples, and note it with the answer."""
        num_classes = len(self.images)
        loss = F.cross_entropy(model(self.images)[:, :num_classes], torch.arange(num_classes))
        self.answer.losses.append(loss.item())
        if self.query is not None:
            # The network normalises by the batch at hand, so the drawing comes among the examples.
            with torch.no_grad():
                scores, features = seen(model, torch.cat([self.images, self.query.unsqueeze(0)]))
            self._note(scores[-1, :num_classes], features)
        return loss

    def _note(self, scores: Tensor, features: Tensor) -> None:
        reading = next(self._readings, None)
        if reading is None:
            self.answer.probabilities.append(scores.softmax(dim=0).tolist())
        else:
            self.answer.probabilities.append(reading.probabilities(scores).tolist())
            self.answer.known.append(reading.known(*signs(scores, features)))


def seen(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of images, and what the last layer is given to make them."""
    *layers, last = model.children()
    features = images
    for layer in layers:
        features = layer(features)
    return last(features), features


class Classifier:
    """A learned and a random initialisation of the same network, to adapt with the same steps.

    Args:
        learned: a learner of the network of Omniglot episodes.
        readings: how its scores are read; None: as a softmax has them.
        torch_defaults: as in `koi.models.omniglot_net`, of the network.
    """

    def __init__(
        self, learned: Koi, readings: Readings | None = None, torch_defaults: bool = False
    ) -> None:
        self._readings = readings or {}
        self.num_outputs = _num_outputs(dict(learned.model.named_parameters()))
        self.num_tasks = learned.iteration * learned.meta_batch_size
        self.algorithm = type(algorithm_of(learned.algorithm)).__name__
        optimizer = learned.settings.optimizer(list(learned.model.parameters()))
        self.optimizer = type(optimizer).__name__
        with preserved_generators(0):
            set_generators(0)
            fresh = omniglot_net(self.num_outputs, torch_defaults)
        random = Koi(fresh, learned.step_size, inner_optimizer=learned.inner_optimizer)
        self._learners = {"learned": learned, "random": random}

    @classmethod
    def load(cls, path: Path = SHIPPED) -> Classifier:
        """Return the classifier of a checkpoint.

        Args:
            path: a checkpoint of Koi, or the folder of a run, whose newest checkpoint is taken.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of another network or of
                one for fewer than three classes.
        """
        file = chosen_checkpoint(Run(path)) if path.is_dir() else path
        what = what_is(file)
        if what != LEARNER:
            raise CheckpointError(
                f"{file} is {what}: give the folder of a run, a checkpoint in it, or what koi "
                "export wrote"
            )
        saved = checkpoint.read(file)
        num_outputs = _num_outputs(saved.params)
        if num_outputs < MIN_CLASSES:
            raise CheckpointError(
                f"the checkpoint {file} is of a network that tells {num_outputs} classes apart: "
                f"give one for at least {MIN_CLASSES}"
            )
        with torch.device("meta"):  # compared before it takes any memory
            expected = {n: p.shape for n, p in omniglot_net(num_outputs).named_parameters()}
        if {name: param.shape for name, param in saved.params.items()} != expected:
            raise CheckpointError(
                f"the checkpoint {file} is of another network: give one of the Omniglot network"
            )
        # The steps of a new task need none of the settings of training but the inner optimizer.
        code = dict.fromkeys(saved.code())
        if "inner_optimizer" in code:
            code["inner_optimizer"] = adam_without_momentum
        recipe = recipe_of(file)
        torch_defaults = recipe is not None and recipe.torch_defaults
        model = omniglot_net(num_outputs, torch_defaults)
        return cls(Koi.load(file, model, **code), readings_of(file), torch_defaults)

    def answer(
        self, images: Tensor, query: Tensor | None, num_steps: int, initialisation: str
    ) -> Answer:
        """Adapt to one image of each class and classify a new one, before and after each step.

        Args:
            images: shape (num_classes, 1, 28, 28), at most as many as the network has outputs.
            query: shape (1, 28, 28), or None to adapt only.
            num_steps: inner steps, each on all images.
            initialisation: "learned", with the moments that the inner optimizer had gathered in
                training, or "random", with none.
        """
        task = Examples(images, query, self._readings.get(initialisation, ()))
        adapted = self.adapted(task, num_steps, initialisation)
        with torch.no_grad():
            task.loss(adapted)
        return task.answer

    def adapted(self, task: Any, num_steps: int, initialisation: str) -> nn.Module:
        """Return the network adapted to a task from the initialisation of that name."""
        return self._learners[initialisation].adapt(task, num_steps)


def _num_outputs(params: dict[str, Tensor]) -> int:
    """Return the length of the last bias; 0 where there is none."""
    last = list(params.values())[-1:]
    return len(last[0]) if last and last[0].dim() == 1 else 0
