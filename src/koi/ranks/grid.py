"""Ranks in two dimensions: task groups, and the shards of φ within each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from koi.errors import ConfigurationError
from koi.phi.shards import Shards


class Grid:
    """Which task group this rank is in, and which ranks have the same shards as it has.

    Args:
        shards: this rank's.
        device: where φ is.

    Attributes:
        number: of the task group, 0 … size − 1.
        size: how many task groups there are.
        column: the process group of the ranks with the same rows of φ, one of each task group.
        source: the first of them.
        device: where φ is.

    Raises:
        ConfigurationError: not all ranks hold shards, or in groups of different size.
    """

    def __init__(self, shards: Shards, device: torch.device) -> None:
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, shards.ranks)
        groups = sorted(set(rows))
        if sorted(rank for group in groups for rank in group) != list(range(len(rows))) or (
            len({len(group) for group in groups}) > 1
        ):
            raise ConfigurationError(
                [
                    f"the shards of φ lie on the ranks {', '.join(map(str, groups))} of "
                    f"{len(rows)}: every rank must be in one group, and all groups of one size"
                ]
            )
        self.number, self.size, self.device = groups.index(shards.ranks), len(groups), device
        for column in zip(*groups, strict=True):
            group = dist.new_group(list(column))
            if dist.get_rank() in column:
                self.column, self.source = group, column[0]

    def any(self, *flags: bool) -> list[bool]:
        """Return which of the flags are set on any rank."""
        values = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [flag > 0 for flag in values.tolist()]

    def from_first_group(self, tensors: list[Tensor]) -> None:
        """Let tensors have, in place, the values that they have in the first task group."""
        for tensor in tensors:
            dist.broadcast(tensor, self.source, group=self.column)
