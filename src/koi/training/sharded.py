"""Checkpoints of a sharded φ, by ``torch.distributed.checkpoint``: every rank writes what it holds.

What is sharded (parameters, moments, the meta-optimizer's state, the mean of φ) goes there as
tensors of torch's own kind, which it can give back to another number of ranks. All the rest is the
content of an ordinary checkpoint, in one of bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koi import storage
from koi.configured import Configured
from koi.errors import CheckpointError
from koi.inner.optimizers.recognition import update_rule
from koi.phi.shards import local
from koi.ranks.group import Ranks
from koi.training import checkpoint
from koi.training.checkpoint import Data, Saved
from koi.training.folder import Folder
from koi.training.state import TrainingState


def mapped(koi: Configured, data: Data, change: Callable[[Any, int], Any]) -> Data:
    """Return what `koi.training.checkpoint.contents` gave, with all that is sharded changed.

    Args:
        koi: the learner.
        data: the contents; those of another rank have marks in the place of what is sharded.
        change: is given each such tensor, or mark, and the number of its parameter.
    """
    learned = koi.settings.learned(koi.model)
    params = learned.params_of(koi.model)
    count = len(params)
    rule = update_rule(koi.settings.optimizer(params), params, differentiable=False)
    slots = 0 if rule is None else rule.num_slots

    def each(values: list[Any], number: int) -> list[Any]:
        own = [change(value, i % count) for i, value in enumerate(values[:number])]
        return own + values[number:]

    data = dict(data)
    names = zip(data["params"].items(), range(count), strict=True)
    data["params"] = {name: change(value, i) for (name, value), i in names}
    if data["moments"] is not None:
        data["moments"] = each(data["moments"], slots * count)
    data["mean"] = {**data["mean"], "values": each(data["mean"]["values"], count)}
    if data["meta_state"] is not None:
        state = {
            i: {name: change(v, i) if _alike(v, params[i]) else v for name, v in own.items()}
            for i, own in data["meta_state"]["state"].items()
        }
        data["meta_state"] = {**data["meta_state"], "state": state}
    return data


def _alike(value: Any, param: Tensor) -> bool:
    return isinstance(value, tuple) or (isinstance(value, Tensor) and value.shape == param.shape)


def taken_out(koi: Configured, data: Data) -> tuple[Data, list[tuple[Tensor, int]]]:
    """Return contents with marks where something is sharded, and what that is."""
    parts: list[tuple[Tensor, int]] = []

    def mark(value: Any, number: int) -> Any:
        parts.append((value, number))
        return ("shard", str(value.dtype).removeprefix("torch."), number)

    return mapped(koi, data, mark), parts


def put_in(koi: Configured, data: Data, parts: list[Tensor]) -> Data:
    """Return contents with what is sharded in the place of the marks."""
    left = iter(parts)
    return mapped(koi, data, lambda _mark, _number: next(left))


class ShardedFolder(Folder):
    """The folder of a training's checkpoints, each a folder in it that all ranks write to.

    Args:
        path: where they lie, the same for all ranks.
    """

    _suffix = ".shards"
    _ranks: Ranks

    def attach(self, ranks: Ranks) -> None:
        """Remember the ranks that write."""
        self._ranks = ranks

    def prepare(self) -> None:
        """Make the folder, lock it and try to write there, once for all ranks.

        Raises:
            CheckpointError: it cannot be used.
        """
        with self._ranks.agreed():
            if self._ranks.first:
                super().prepare()

    def check_unused(self, iteration: int) -> None:
        """Check that a learner of so many meta-iterations would overwrite nothing.

        Raises:
            CheckpointError: a training that is further lies there.
        """
        with self._ranks.agreed():
            if self._ranks.first:
                super().check_unused(iteration)

    def save(self, koi: Configured, state: TrainingState, number: int) -> None:
        """Write a checkpoint: it appears under its name whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        import torch.distributed.checkpoint as dcp

        data, parts = taken_out(koi, checkpoint.contents(koi, state))
        content = self._ranks.from_first(storage.pack(data))
        path = self.file(number)
        begun = path.with_name(f".{path.name}.tmp")
        tensors: dict[str, Any] = {"koi": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        params = list(koi.model.parameters())
        for place, (value, i) in enumerate(parts):
            tensors[f"shard-{place}"] = _global(value, params[i])
        try:
            dcp.state_dict_saver.save(tensors, checkpoint_id=begun)
            with self._ranks.agreed():
                if self._ranks.first:
                    shutil.rmtree(path, ignore_errors=True)
                    begun.rename(path)
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be written ({error}): φ and earlier checkpoints "
                "are as they were; make room or choose another folder, and go on"
            ) from error

    def read(self, koi: Configured, number: int) -> Saved:
        """Read a checkpoint, of whatever number of ranks: each takes the rows that it holds.

        Raises:
            CheckpointError: it cannot be read.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.tensor import empty

        path = self.file(number)
        try:
            stored: Any = dcp.filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
            whole = {"koi": torch.empty(stored["koi"].size, dtype=torch.uint8)}
            dcp.state_dict_loader.load(whole, checkpoint_id=path)
            data = storage.unpack(whole["koi"].numpy().tobytes(), path)
            marks: list[tuple[str, int]] = []
            mapped(koi, data, lambda mark, _number: marks.append(mark[1:]))
            params: list[Any] = list(koi.model.parameters())
            tensors = {
                f"shard-{place}": empty(
                    params[i].shape,
                    dtype=getattr(torch, dtype),
                    device_mesh=params[i].device_mesh,
                    placements=params[i].placements,
                )
                for place, (dtype, i) in enumerate(marks)
            }
            dcp.state_dict_loader.load(tensors, checkpoint_id=path)
        except (OSError, KeyError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}): use an "
                "earlier one, or give the model that it was made with"
            ) from error
        parts = [local(tensor) for tensor in tensors.values()]
        return checkpoint.saved_from(put_in(koi, data, parts), path)

    def remove_old(self) -> None:
        """Remove all but the last two good ones, and what was never completed."""
        if self._ranks.first:
            super().remove_old()

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def _listed(self) -> list[int]:
        """Return those that rank 0 sees."""
        return self._ranks.value_of_first(self._numbers() if self._ranks.first else [])


def _global(rows: Tensor, param: Any) -> Any:
    """Return a tensor's rows on this rank as a part of the tensor that all ranks hold."""
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    form = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(rows, mesh, placements, run_check=False, **form)
