"""The commonest task: inputs, targets and a criterion, with minibatches and a query set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi import allowed
from koi.errors import ConfigurationError
from koi.randomness import split_mix
from koi.tasks import tensor_task, with_tensors


def cycled_order(key: Tensor, size: int, batch_size: int, num_steps: int) -> Tensor:
    """Return what examples each inner step sees, shape (num_steps, batch_size), no replacement.

    An endless stream goes through all ``size`` examples, then through all of them again in a new
    random order, and so on; minibatches are cut from it and may span two passes (`_mini_batches`
    in the paper's code). The first pass keeps the order in which the examples lie. Later orders
    are a function of ``key``, an int64 scalar, alone: the same in every engine, and possible
    under ``vmap`` and inside a compiled graph.

    >>> cycled_order(torch.tensor(7), size=4, batch_size=2, num_steps=2).tolist()
    [[0, 1], [2, 3]]
    >>> cycled_order(torch.tensor(7), size=4, batch_size=2, num_steps=6)[2:4].flatten().sort()[0]
    tensor([0, 1, 2, 3])
    """
    needed = num_steps * batch_size
    num_passes = -(-needed // size)
    order = torch.arange(size, device=key.device).unsqueeze(0)
    if num_passes > 1:
        count = torch.arange(size, num_passes * size, device=key.device)
        noise = split_mix(key + count * 0x9E3779B9).reshape(num_passes - 1, size)
        order = torch.cat([order, noise.argsort(dim=1)])
    return order.reshape(-1)[:needed].reshape(num_steps, batch_size)


@tensor_task
@dataclasses.dataclass
class SupervisedTask:
    """Inputs and targets, in a support set to learn from and a query set to be measured on.

    The inner loop minimises ``criterion(model(inputs), targets)`` on minibatches of the support
    set, cycling through it without replacement; `koi.Koi.evaluate` measures it on the query set.

    Args:
        support_inputs: shape (num_support, …), in random order.
        support_targets: shape (num_support, …).
        query_inputs: shape (num_query, …).
        query_targets: shape (num_query, …).
        key: an int64 scalar that orders the second and later passes (see `cycled_order`).
        criterion: (predictions, targets) -> scalar.
        batch_size: examples in each inner step; None, or more than there are: all of them.
        weight: what the task counts in the means of its meta-batch, a scalar; None: 1.

    Raises:
        ConfigurationError: sets that are empty, or no tensors, or whose lengths differ.

    >>> x = torch.linspace(-1, 1, 6).unsqueeze(1)
    >>> task = SupervisedTask(x, 2 * x, x, 2 * x, torch.tensor(0), batch_size=4)
    >>> task.loss(torch.nn.Identity())
    tensor(0.4667)
    >>> [len(step.support_inputs) for step in task.minibatches(3)]
    [4, 4, 4]
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor
    key: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
    batch_size: int | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check what can be seen from outside: many tasks in one have their number in the key."""
        sets = ("support_inputs", "support_targets", "query_inputs", "query_targets", "key")
        usual = all(type(getattr(self, name)) is Tensor for name in sets)
        # every meta-iteration makes tasks, and most of them are seen to be right at a glance
        function = callable(self.criterion) and not isinstance(self.criterion, type)
        if not (usual and function and self.batch_size is None):
            allowed.check(
                **{name: (getattr(self, name), allowed.tensor) for name in sets},
                criterion=(self.criterion, _criterion),
                batch_size=(self.batch_size, allowed.optional(allowed.count(1))),
            )
        if self.key.dtype != torch.int64:
            raise ConfigurationError([f"key is of type {self.key.dtype}: must be int64"])
        for name in ("support", "query"):
            inputs, targets = getattr(self, f"{name}_inputs"), getattr(self, f"{name}_targets")
            depth = self.key.dim() + 1
            if (
                inputs.dim() < depth
                or 0 in inputs.shape
                or inputs.shape[:depth] != targets.shape[:depth]
            ):
                raise ConfigurationError(
                    [
                        f"{name}_inputs of shape {tuple(inputs.shape)} and {name}_targets of shape "
                        f"{tuple(targets.shape)}: must have one entry each for each example, and "
                        "at least one example"
                    ]
                )

    def loss(self, model: nn.Module) -> Tensor:
        """Return the criterion on the support set (of a minibatch: on the minibatch)."""
        return self.criterion(model(self.support_inputs), self.support_targets)

    @property
    def query(self) -> SupervisedTask:
        """The same task on its query set."""
        return self._on(self.query_inputs, self.query_targets)

    def minibatches(self, num_steps: int) -> list[SupervisedTask]:
        """Return the task as each of ``num_steps`` inner steps sees it."""
        allowed.check(num_steps=(num_steps, allowed.count(0, allowed.MOST_STEPS)))
        size = len(self.support_inputs)
        if self.batch_size is None or self.batch_size >= size:
            return [self] * num_steps
        if num_steps * self.batch_size <= size:  # one pass needs no order: slices are views
            inputs: Iterable[Tensor] = self.support_inputs.split(self.batch_size)
            targets: Iterable[Tensor] = self.support_targets.split(self.batch_size)
        else:
            order = cycled_order(self.key, size, self.batch_size, num_steps)
            inputs, targets = self.support_inputs[order], self.support_targets[order]
        pairs = islice(zip(inputs, targets, strict=True), num_steps)
        return [self._on(x, y) for x, y in pairs]

    def _on(self, inputs: Tensor, targets: Tensor) -> SupervisedTask:
        other: SupervisedTask = with_tensors(
            self, {"support_inputs": inputs, "support_targets": targets}
        )
        return other


def _criterion(value: Any) -> Any:
    """Take a callable, but no class of a loss, which would take predictions for its settings."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise allowed.Refused(f"an object in the place of its class, {value.__name__}()")
    return allowed.code("(predictions, targets)")(value)
