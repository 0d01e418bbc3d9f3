"""A φ that is sharded: every parameter lies in parts on several ranks (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from koi.errors import ModelError, RankError

_known: Any = WeakTensorKeyDictionary()  # a sharded tensor -> its rows on this rank

_ALLOWED = (
    "Koi trains what torch.distributed.fsdp.fully_shard has made of a whole model: each of its "
    "parameters in rows (Shard(0)) on one mesh of one dimension, such as mesh['shards'] of "
    "init_device_mesh('cpu', (task_groups, shards), mesh_dim_names=('tasks', 'shards')), all of "
    "them with requires_grad"
)


@dataclass(frozen=True)
class Shards:
    """The ranks that hold one φ together, each its rows of every parameter.

    They adapt to the same task at the same time: for each layer torch gathers the rows of all, and
    gives each rank the mean gradient of its own. Everything that works element by element (inner
    steps, the meta-update, moments) works on the rows alone; a norm is a sum over ranks.

    Args:
        group: the process group.
        ranks: those in it, in the order of their rows.
    """

    group: Any
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Shards | None:
        """Read it off a module; None where it is whole on every rank.

        Raises:
            ModelError: it is sharded otherwise than by ``fully_shard`` as a whole.
        """
        settle(module)
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        sharded = {name: t for name, t in tensors.items() if hasattr(t, "device_mesh")}
        if not sharded:
            return None
        named = ", ".join(sharded)
        meshes = {getattr(t, "device_mesh", None) for t in module.parameters()}
        mesh: Any = next(iter(meshes))
        in_rows = all(
            len(t.placements) == 1 and t.placements[0].is_shard(0)  # type: ignore[attr-defined]
            for t in sharded.values()
        )
        able = all(p.requires_grad and p.is_floating_point() for p in module.parameters())
        if not (_is_fsdp(module) and len(meshes) == 1 and in_rows and able and mesh.ndim == 1):
            raise ModelError(f"the model has sharded parameters ({named}): {_ALLOWED}")
        group = mesh.get_group()
        return cls(group, tuple(dist.get_process_group_ranks(group)))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over the ranks.

        Raises:
            RankError: one of them cannot be reached.
        """
        return self._reduced(values, dist.ReduceOp.SUM)

    def all_evaluate(self, evaluates: bool, device: torch.device) -> bool | None:
        """Return whether the ranks are to evaluate; None: some of them are, and others go on.

        Raises:
            RankError: one of them cannot be reached.
        """
        flags = torch.tensor([evaluates, not evaluates], dtype=torch.int32, device=device)
        some, others = self._reduced(flags, dist.ReduceOp.MAX).tolist()
        return None if some and others else bool(some)

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        summed = values.clone()
        try:
            dist.all_reduce(summed, how, group=self.group)
        except RuntimeError as error:
            raise RankError(
                f"not all of the ranks {self.ranks}, which hold the shards of φ, can be reached "
                f"({str(error).strip()})"
            ) from error
        return summed


def in_words(module: nn.Module) -> dict[str, str]:
    """Return what must be the same on all ranks for their shards to fit together."""
    parts = [name or "the whole" for name, part in module.named_modules() if _is_fsdp(part)]
    if not parts:
        return {"model": "whole"}
    shapes = {f"shape of {name}": str(tuple(p.shape)) for name, p in module.named_parameters()}
    return {"model": f"in shards, by fully_shard of {', '.join(parts)}"} | shapes


def settle(module: nn.Module, after_error: bool = False) -> None:
    """Let a module that is sharded have its shards, as after a forward pass alone it has not.

    Args:
        module: any module.
        after_error: whether that may have ended in its midst, where FSDP keeps the weights that it
            has gathered for the way back, unless told not to.
    """
    for part in module.modules():
        if _is_fsdp(part):
            if after_error:
                part.set_reshard_after_forward(True, recurse=False)  # type: ignore[operator]
            part.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that are on this rank, the same object every time."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    known: Tensor | None = _known.get(tensor)
    # FSDP makes another object of the same memory when it first runs
    if known is not None and known.data_ptr() == rows.data_ptr() and known.shape == rows.shape:
        return known
    _known[tensor] = rows
    return rows


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the rows of each tensor that are on this rank."""
    return [local(t) for t in tensors]


def _is_fsdp(module: nn.Module) -> bool:
    # by name: importing torch.distributed.fsdp takes a second
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
