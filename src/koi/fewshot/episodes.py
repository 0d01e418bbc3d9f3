"""N-way K-shot episodes from labelled data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from koi import allowed
from koi.errors import CheckpointError, ConfigurationError, DataError
from koi.fewshot.data import labelled
from koi.ragged import RaggedTask
from koi.randomness import split_mix
from koi.supervised import SupervisedTask
from koi.tasks import TaskBatch

_SHOWN = 3
_GOLDEN = -7046029254386353131  # 2⁶⁴ times the golden ratio's fraction, the step of SplitMix64


class Episodes:
    """N-way K-shot classification: a task distribution over labelled data.

    An episode is num_ways classes drawn without replacement, renumbered 0 … num_ways − 1 in the
    order drawn, and of each num_shots support and num_queries query examples, no example in both
    (section 6.1 of the paper; Vinyals et al., arXiv 1606.04080). The loss is the cross-entropy of
    ``model(inputs)``, shape (examples, num_ways).

    What it samples is a `koi.SupervisedTask`. Where ways or shots vary, each episode draws its own,
    uniformly, which like all draws depends on the seed and its place alone; it is then a
    `koi.RaggedTask`, whose loss looks at the first outputs of the model, one for each of its ways.

    A checkpoint of a training holds the names of the
    classes, and going on with other classes is refused, as test classes could be among them.

    Args:
        data: whatever `labelled` takes: a pair (inputs, labels), a dataset, a folder of images,
            or `LabelledData`, such as one part of a split by classes.
        num_ways: classes in an episode; a pair (fewest, most) lets them vary.
        num_shots: support examples of each class; likewise.
        num_queries: query examples of each class.
        batch_size: support examples in each inner step; None, or more than there are: all.
        device: where the tasks' tensors go, and with them the data, so that drawing a task copies
            nothing (but see `LabelledData.to`); None: where the data are. A seed's tasks are the
            same on every device.

    Raises:
        ConfigurationError: numbers that are no positive whole numbers, or too many ways.
        DataError: a class with too few examples, named.

    >>> data = labelled((torch.rand(12, 8), torch.arange(12) % 4))
    >>> episodes = Episodes(data, num_ways=3, num_shots=2, num_queries=1)
    >>> task = episodes.sample()
    >>> task.support_inputs.shape, task.query_targets.sort().values
    (torch.Size([6, 8]), tensor([0, 1, 2]))
    >>> episodes.sample_batch(5).support_inputs.shape
    torch.Size([5, 6, 8])
    >>> varying = Episodes(data, num_ways=(2, 4), num_shots=(1, 2))
    >>> varying.sample().num_ways in (2, 3, 4)
    True
    """

    def __init__(
        self,
        data: Any,
        num_ways: int | tuple[int, int],
        num_shots: int | tuple[int, int],
        num_queries: int = 1,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        allowed.check(
            num_ways=(num_ways, _count_or_range),
            num_shots=(num_shots, _count_or_range),
            num_queries=(num_queries, allowed.count(1)),
            batch_size=(batch_size, allowed.optional(allowed.count(1))),
            device=(device, allowed.optional(allowed.device)),
        )
        self.data = labelled(data) if device is None else labelled(data).to(device)
        self.num_ways = num_ways
        self.num_shots = num_shots
        self.num_queries = num_queries
        self.batch_size = batch_size
        self.device = device
        self._check()
        self._counts = torch.tensor(self.data.counts, device=self.data.device)
        self._most = max(self.data.counts)
        # one string, since a training copies this state at every meta-iteration
        self._names = json.dumps(self.data.classes, ensure_ascii=False)

    def sample(self) -> SupervisedTask:
        """Draw one episode."""
        sizes = _drawn(self.num_ways), _drawn(self.num_shots)
        task = cast(SupervisedTask, TaskBatch(stacked=self._batch(*sizes, 1)).tasks[0])
        if not self._vary:
            return task
        most = _ends(self.num_ways)[1]
        capacity = most * _ends(self.num_shots)[1], most * self.num_queries
        return RaggedTask(**vars(task), num_ways=sizes[0], capacity=capacity)

    @property
    def sample_batch(self) -> Callable[..., SupervisedTask]:
        """``sample_batch(num_tasks)`` draws many episodes at once, of equal ways and shots.

        Each tensor has them along its first dimension. With ``first`` and ``total`` (None: first +
        num_tasks) they are those from ``first`` on of the ``total`` that are drawn together; of the
        others no example is loaded. Episodes that vary have no such method.
        """
        if self._vary:
            raise AttributeError("episodes that vary have no sample_batch: take sample")
        return partial(self._batch, _ends(self.num_ways)[1], _ends(self.num_shots)[1])

    @property
    def _vary(self) -> bool:
        return isinstance(self.num_ways, tuple) or isinstance(self.num_shots, tuple)

    def _batch(
        self, ways: int, shots: int, num_tasks: int, first: int = 0, total: int | None = None
    ) -> SupervisedTask:
        allowed.check(
            num_tasks=(num_tasks, allowed.count(1)),
            first=(first, allowed.count(0)),
            total=(total, allowed.optional(allowed.count(1))),
        )
        device = self.data.device
        # each row's largest numbers in falling order, or the order of all, are a draw without
        # replacement
        shapes = (len(self.data),), (ways, self._most), (ways * shots,), (ways * self.num_queries,)
        noise = self._noise(total or first + num_tasks, *shapes, ())
        by_class, by_example, by_support, by_query, key = (
            part[first : first + num_tasks] for part in noise
        )
        classes = by_class.topk(ways).indices
        examples = self._examples(classes, by_example, shots + self.num_queries)
        order = by_support.argsort(1)
        # a model that looks across the queries could tell the class by the place
        shuffled = by_query.argsort(1)
        numbers = torch.arange(ways, device=device)
        support_targets = numbers.repeat_interleave(shots)[order]
        query_targets = numbers.repeat_interleave(self.num_queries)[shuffled]
        support = classes.gather(1, support_targets), examples[..., :shots].flatten(1)
        query = classes.gather(1, query_targets), examples[..., shots:].flatten(1)
        return SupervisedTask(
            self._placed(self.data.take_known(support[0], support[1].gather(1, order))),
            self._placed(support_targets),
            self._placed(self.data.take_known(query[0], query[1].gather(1, shuffled))),
            self._placed(query_targets),
            self._placed(key),
            criterion=F.cross_entropy,
            batch_size=self.batch_size,
        )

    def state_dict(self) -> dict[str, str]:
        """Return what a checkpoint keeps: the names of the classes."""
        return {"classes": self._names}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Check that a checkpoint was made with these classes.

        Raises:
            CheckpointError: it was made with others.
        """
        names = state.get("classes") if isinstance(state, Mapping) else None
        if names == self._names:
            return
        there, here = _names_in(names), self.data.classes
        missing = [name for name in there if name not in set(here)]
        new = [name for name in here if name not in set(there)]
        raise CheckpointError(
            f"the checkpoint was trained on other classes ({_listed(missing)} missing here, "
            f"{_listed(new)} new here): split the same data with the seed that was used then, so "
            "that no class that was kept for a test is trained on"
        )

    def _noise(self, num_tasks: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Return random whole numbers, of each task in these shapes, no two alike.

        They follow from one number of torch's generator of the CPU, so that the tasks are the same
        wherever the data are, and nothing is copied there.
        """
        sizes = [num_tasks * math.prod(shape) for shape in shapes]
        start = int(torch.randint(2**62, ()))
        places = torch.arange(sum(sizes), device=self.data.device)
        noise = split_mix(start + places * _GOLDEN).split(sizes)
        return [part.reshape(num_tasks, *shape) for part, shape in zip(noise, shapes, strict=True)]

    def _examples(self, classes: Tensor, noise: Tensor, count: int) -> Tensor:
        """Draw so many examples of each class, shape (tasks, ways, count): support comes first."""
        counts = self._counts[classes].unsqueeze(-1)
        missing = torch.arange(self._most, device=counts.device) >= counts
        noise = noise.masked_fill(missing, torch.iinfo(torch.long).min)
        return noise.topk(count).indices

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _check(self) -> None:
        if _ends(self.num_ways)[1] > len(self.data):
            raise ConfigurationError(
                [f"num_ways = {self.num_ways}: the data have {len(self.data)} classes"]
            )
        shots = _ends(self.num_shots)[1]
        needed = shots + self.num_queries
        small = [
            f"{name!r} has {count}"
            for name, count in zip(self.data.classes, self.data.counts, strict=True)
            if count < needed
        ]
        if small:
            raise DataError(
                f"too few examples: class {_listed(small)}, and an episode needs {needed} "
                f"({shots} shots and {self.num_queries} queries): leave such classes out "
                "with data.subset, or take fewer shots or queries"
            )


def _names_in(stored: Any) -> list[str]:
    """Return the names in a state that was stored.

    Raises:
        CheckpointError: it is none of a distribution of episodes.
    """
    try:
        names = json.loads(stored)
    except (TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "the state is none that Episodes.state_dict gave: go on with the tasks that were "
            "trained on"
        )
    return names


def _count_or_range(value: Any) -> Any:
    """Take a whole number, or a pair of them."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    for number in value if is_pair else (value,):
        try:
            allowed.count(1)(number)
        except allowed.Refused as refused:
            raise allowed.Refused(f"{refused}, or a pair of them, (fewest, most)") from None
    if is_pair and value[0] > value[1]:
        raise allowed.Refused("a pair (fewest, most), the first of which is not the larger")
    return value


def _ends(given: int | tuple[int, int]) -> tuple[int, int]:
    """Return the fewest and the most."""
    return given if isinstance(given, tuple) else (given, given)


def _drawn(given: int | tuple[int, int]) -> int:
    """Return the number, or one of the range."""
    if not isinstance(given, tuple):
        return given
    return int(torch.randint(given[0], given[1] + 1, ()))


def _listed(items: list[str]) -> str:
    """Return the first few items, and how many more there are."""
    if not items:
        return "none"
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
