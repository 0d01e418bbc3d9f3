"""The sine waves of the paper.

A recipe has all that ``Koi(recipe.model(), **recipe.settings)`` needs, the tasks that ``train``
gets, and the new tasks that ``evaluate`` gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from koi import allowed
from koi.models import sine_mlp
from koi.phi.schedules import linear
from koi.problems import Sines
from koi.tasks import TaskDistribution


@dataclass(frozen=True)
class Recipe:
    """An experiment: what learns, from which tasks, how, and what it is measured on.

    Args:
        model: makes the network, its weights fresh from the global generator.
        settings: the arguments of `koi.Koi` that come after the model.
        tasks: the distribution to learn from.
        new_tasks: the distribution to evaluate on.
        num_new_steps: inner steps on each of the new tasks.
    """

    model: Callable[[], nn.Module]
    settings: dict[str, Any]
    tasks: TaskDistribution
    new_tasks: TaskDistribution
    num_new_steps: int


def sine(num_iterations: int = 30_000) -> Recipe:
    """Return the sine waves of section 5.1 and figure 1, by default at the paper's length.

    Five SGD steps on minibatches of 10 of a wave's 50 points, ε from 0.1 to 0; then 32 steps on
    new waves seen at 10 points.

    >>> from koi import Koi
    >>> recipe = sine(num_iterations=2)
    >>> koi = Koi(recipe.model(), **recipe.settings)
    >>> model = koi.train(recipe.tasks)
    >>> [round(record.meta_step_size, 3) for record in koi.history]
    [0.1, 0.05]
    """
    allowed.check(num_iterations=(num_iterations, allowed.count(0)))
    return Recipe(
        model=sine_mlp,
        settings={
            "step_size": 0.02,
            "num_steps": 5,
            "num_iterations": num_iterations,
            "meta_step_size": linear(0.1, 0.0),
        },
        tasks=Sines(num_points=50, batch_size=10),
        new_tasks=Sines(num_points=10, batch_size=10),
        num_new_steps=32,
    )
