"""Supervised tasks whose sets differ in size: as they are one by one, padded and masked at once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi import allowed
from koi.errors import ConfigurationError, EngineError, TaskError
from koi.randomness import split_mix
from koi.supervised import SupervisedTask
from koi.tasks import tensor_task, with_tensors

# There is always a row of padding, so that the check of an engine on the first tasks (in
# koi.inner.checks) finds a layer that looks across examples, whatever their sizes.
_SPARE = 1


@tensor_task
@dataclasses.dataclass
class RaggedTask(SupervisedTask):
    """A `SupervisedTask` whose sets, and number of classes, may differ from task to task.

    The loss is the mean of the examples' losses l_i, ``criterion(predictions, targets,
    reduction="none")``. One by one tasks are as they are. At once their sets are filled up to one
    size by repetitions of their own examples, which a mask m leaves out of the loss
    Σ m_i l_i / Σ m_i and out of BatchNorm's statistics: the same but for rounding. All that another
    layer makes of one example must depend on no other; BatchNorm that is not torch's own, or is
    compiled, is refused.

    Args:
        support_inputs: shape (num_support, …), in random order.
        support_targets: shape (num_support, …).
        query_inputs: shape (num_query, …).
        query_targets: shape (num_query, …).
        key: an int64 scalar that orders the later passes, as in `SupervisedTask`.
        criterion: (predictions, targets, reduction="none") -> losses, shape (n, …), as those of
            ``torch.nn.functional``; what it gives for an example is averaged.
        batch_size: examples in each inner step; None, or more than there are: all of them.
        weight: what the task counts in the means of its meta-batch, a scalar; None: 1.
        num_ways: with ``F.cross_entropy``: the model's first so many outputs are the task's
            classes, and no others are looked at; None: all.
        capacity: (support, query) examples to fill up to at least, so that ``compile=True`` meets
            one shape; None: as many as the largest of the tasks that run at once has.

    Raises:
        ConfigurationError: what cannot go together, named.

    >>> def task(n):
    ...     x, key = torch.arange(1.0, n + 1).unsqueeze(1), torch.tensor(0)
    ...     return RaggedTask(x, 0 * x, x, 0 * x, key)
    >>> task(2).loss(nn.Identity()), task(3).loss(nn.Identity())
    (tensor(2.5000), tensor(4.6667))
    >>> from koi import stack
    >>> at_once = stack([task(2), task(3)])
    >>> at_once.support_inputs.shape, at_once.num_support
    (torch.Size([2, 4, 1]), tensor([2, 3]))
    """

    num_ways: int | None = None
    capacity: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check what can be seen from outside."""
        super().__post_init__()
        capacity = allowed.each(allowed.count(1), "two numbers")
        allowed.check(
            num_ways=(self.num_ways, allowed.optional(allowed.count(1))),
            capacity=(self.capacity, allowed.optional(capacity)),
        )
        problems = []
        if not _takes_reduction(self.criterion):
            problems.append(
                "the criterion of a RaggedTask cannot be called as criterion(predictions, targets, "
                'reduction="none"): it must then give a loss for each example, as F.mse_loss does'
            )
        if self.num_ways is not None and self.criterion is not F.cross_entropy:
            problems.append("num_ways of a RaggedTask goes with criterion=F.cross_entropy alone")
        if problems:
            raise ConfigurationError(problems)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the mean of the losses on the support set (of a minibatch: on the minibatch)."""
        predictions = model(self.support_inputs)
        if self.num_ways is not None:
            if predictions.shape[-1] < self.num_ways:
                raise TaskError(
                    f"the model gives {predictions.shape[-1]} outputs, and a task has num_ways = "
                    f"{self.num_ways} classes: give it as many as the most ways of a task"
                )
            predictions = predictions[..., : self.num_ways]
        return _each(self.criterion, predictions, self.support_targets).mean()

    @staticmethod
    def of_one_shape(tasks: Sequence[RaggedTask]) -> list[PaddedTask]:
        """Return the tasks filled up to one size, as `koi.stack` needs them.

        Raises:
            EngineError: they are of a subclass, of which this knows nothing.
        """
        if type(tasks[0]) is not RaggedTask:
            raise EngineError(
                f"{type(tasks[0]).__name__} is a subclass of RaggedTask, which cannot be padded: "
                "give it a method of_one_shape(tasks) of its own, or use vectorize=False"
            )
        support = [len(task.support_inputs) for task in tasks]
        query = [len(task.query_inputs) for task in tasks]
        capacities = [task.capacity or (1, 1) for task in tasks]
        sizes = [max(own) for own in zip(*capacities, strict=True)]
        sizes = [max(size, *own) for size, own in zip(sizes, (support, query), strict=True)]
        fewest = min(*support, 2), min(*query, 2)
        return [_padded(task, sizes[0] + _SPARE, sizes[1] + _SPARE, fewest) for task in tasks]


@tensor_task
@dataclasses.dataclass
class PaddedTask:
    """A `RaggedTask` whose sets are filled up: the first ``num_support`` rows are its examples.

    Args:
        support_inputs, support_targets, query_inputs, query_targets, key: as there, filled up.
        num_support, num_query: how many rows are examples, scalars.
        num_ways: how many outputs are classes, a scalar; None: all.
        criterion, batch_size: as there.
        fewest: the fewest support and query examples of the tasks that run at once, at most 2.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor
    key: Tensor
    num_support: Tensor
    num_query: Tensor
    num_ways: Tensor | None
    criterion: Callable[..., Tensor]
    batch_size: int | None
    fewest: tuple[int, int]

    def loss(self, model: nn.Module) -> Tensor:
        """Return the mean of the examples' losses on the support set."""
        rows = torch.arange(len(self.support_inputs), device=self.key.device) < self.num_support
        if _normalises_by_batch(model):
            with _counting(Counted(rows, self.fewest[0])):
                predictions = model(self.support_inputs)
        else:  # so that a graph need not know of the context
            predictions = model(self.support_inputs)
        if self.num_ways is not None:
            outputs = torch.arange(predictions.shape[-1], device=predictions.device)
            predictions = predictions.masked_fill(outputs >= self.num_ways, -torch.inf)
        each = _each(self.criterion, predictions, self.support_targets)
        return torch.where(rows, each, 0).sum() / self.num_support

    @property
    def query(self) -> PaddedTask:
        """The same task on its query set."""
        held_out = {"support_inputs": self.query_inputs, "support_targets": self.query_targets}
        return self._with(**held_out, num_support=self.num_query, fewest=self.fewest[::-1])

    def minibatches(self, num_steps: int) -> list[PaddedTask]:
        """Return the task as each of ``num_steps`` inner steps sees it, as the ragged one does."""
        size, batch_size = len(self.support_inputs), self.batch_size
        if batch_size is None or batch_size >= size - _SPARE:
            return [self] * num_steps
        order = cycled_order_of_some(self.key, self.num_support, size, batch_size, num_steps)
        order = torch.cat([order, order[:, :_SPARE]], dim=1)
        inputs, targets = self.support_inputs[order], self.support_targets[order]
        count = self.num_support.clamp(max=batch_size)
        fewest = min(self.fewest[0], batch_size), self.fewest[1]
        return [
            self._with(support_inputs=x, support_targets=y, num_support=count, fewest=fewest)
            for x, y in zip(inputs, targets, strict=True)
        ]

    def _with(self, **changes: Any) -> PaddedTask:
        other: PaddedTask = with_tensors(self, changes)
        return other


class Counted(NamedTuple):
    """Which rows of a batch are examples, and how few a task of those that run at once has."""

    rows: Tensor
    fewest: int


_counted: list[Counted] = []


def counted_now() -> Counted | None:
    """Return which rows count in the loss that is being computed; None: all."""
    return _counted[-1] if _counted else None


@contextmanager
def _counting(counted: Counted) -> Iterator[None]:
    _counted.append(counted)
    try:
        yield
    finally:
        _counted.pop()


_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def _normalises_by_batch(model: nn.Module) -> bool:
    """Return whether some BatchNorm looks across the batch.

    Raises:
        EngineError: one does that cannot leave rows out.
    """
    found = False
    for name, part in model.named_modules():
        if isinstance(part, _NORMS) and (part.training or part.running_mean is None):
            if not getattr(part, "leaves_padding_out", False):
                raise EngineError(
                    f"{type(part).__name__} {name!r} normalises by all rows of a batch, and tasks "
                    "of different sizes that run at once have rows of padding: use "
                    "vectorize=False, or compile=False with torch's own BatchNorm, or a GroupNorm"
                )
            found = True
    return found


def cycled_order_of_some(
    key: Tensor, count: Tensor, size: int, batch_size: int, num_steps: int
) -> Tensor:
    """Return `koi.supervised.cycled_order` of the first ``count`` of ``size`` rows.

    Where a minibatch holds all of them, each step sees the first ``batch_size`` rows.

    >>> from koi.supervised import cycled_order
    >>> key, three = torch.tensor(7), torch.tensor(3)
    >>> bool((cycled_order_of_some(key, three, 5, 2, 4) == cycled_order(key, 3, 2, 4)).all())
    True
    """
    needed = num_steps * batch_size
    num_passes = -(-needed // (batch_size + 1))  # of the fewest that are more than a minibatch
    rows = torch.arange(size, device=key.device)
    places = torch.arange(needed, device=key.device)
    numbers = torch.arange(1, num_passes, device=key.device).unsqueeze(1) * count + rows
    last = torch.iinfo(torch.int64).max
    noise = split_mix(key + numbers * 0x9E3779B9).masked_fill(rows >= count, last)
    order = torch.cat([rows.unsqueeze(0), noise.argsort(dim=1)]).flatten()
    number = (places // count).clamp(max=num_passes - 1)
    cycled = order[number * size + places % count].reshape(num_steps, batch_size)
    return torch.where(count > batch_size, cycled, rows[:batch_size].expand(num_steps, -1))


def _padded(task: RaggedTask, support: int, query: int, fewest: tuple[int, int]) -> PaddedTask:
    def filled(tensor: Tensor, size: int) -> Tensor:
        return tensor[torch.arange(size, device=tensor.device) % len(tensor)]

    def number(value: int) -> Tensor:
        return torch.tensor(value, device=task.key.device)

    return PaddedTask(
        filled(task.support_inputs, support),
        filled(task.support_targets, support),
        filled(task.query_inputs, query),
        filled(task.query_targets, query),
        task.key,
        number(len(task.support_inputs)),
        number(len(task.query_inputs)),
        None if task.num_ways is None else number(task.num_ways),
        task.criterion,
        task.batch_size,
        fewest,
    )


def _each(criterion: Callable[..., Tensor], predictions: Tensor, targets: Tensor) -> Tensor:
    each: Any = criterion(predictions, targets, reduction="none")
    if not isinstance(each, Tensor) or each.dim() == 0 or len(each) != len(targets):
        found = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
        raise TaskError(
            f"the criterion of a RaggedTask gave {found} for {len(targets)} examples: with "
            'reduction="none" it must give a loss for each, along the first dimension'
        )
    return each.flatten(1).mean(1) if each.dim() > 1 else each


@functools.lru_cache(maxsize=32)
def _takes_reduction(criterion: Callable[..., Any]) -> bool:
    try:
        inspect.signature(criterion).bind(None, None, reduction="none")
    except TypeError:
        return False
    except ValueError:  # of what is written in C nothing is known
        return True
    return True
