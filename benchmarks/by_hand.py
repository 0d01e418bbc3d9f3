"""Reptile as one writes it by hand: the loop that Koi is measured against.

It copies the state, makes a fresh optimizer for each task and loops in Python. Sampling is
written by hand too. Nothing in it is slower than it needs to be for readers to follow.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


def reptile(
    model: nn.Module,
    sample_batches: Callable[[], Batches],
    criterion: Callable[[Tensor, Tensor], Tensor],
    make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    num_iterations: int,
    meta_batch_size: int,
    meta_step_size: float,
) -> None:
    """Train ``model`` in place, ε falling linearly to 0."""
    for iteration in range(num_iterations):
        epsilon = meta_step_size * (1 - iteration / num_iterations)
        before = deepcopy(model.state_dict())
        total = {name: torch.zeros_like(value) for name, value in before.items()}
        for _ in range(meta_batch_size):
            model.load_state_dict(before)
            optimizer = make_optimizer(model.parameters())
            for inputs, targets in sample_batches():
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name] += value - before[name]
        model.load_state_dict(
            {name: before[name] + epsilon / meta_batch_size * total[name] for name in before}
        )


GRID = torch.linspace(-5, 5, 50).unsqueeze(1)


def sine_batches(num_steps: int = 5, batch_size: int = 10) -> Iterator[tuple[Tensor, Tensor]]:
    """One sine wave, as minibatches of its 50 points without replacement (at most one pass)."""
    amplitude, phase = torch.rand(2).tolist()
    x = GRID[torch.randperm(50)]
    y = (0.1 + 4.9 * amplitude) * torch.sin(x + 2 * math.pi * phase)
    yield from list(zip(x.split(batch_size), y.split(batch_size), strict=True))[:num_steps]


def random_batches(
    shape: tuple[int, ...], num_steps: int = 5, batch_size: int = 10
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random numbers of 5 classes, as minibatches without replacement."""
    inputs = torch.rand(num_steps * batch_size, *shape)
    labels = torch.randint(5, (num_steps * batch_size,))
    yield from zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
