"""Checkpoints of a sharded φ, by ``torch.distributed.checkpoint``: every rank writes what it holds.

What is sharded (parameters, moments, the meta-optimizer's state, the mean of φ) goes there as
tensors of torch's own kind, which it can give back to another number of ranks. All the rest is the
content of an ordinary checkpoint, in one of bytes. Beside them lies a list of the files' checksums,
which torch's kind has not.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koi import files, memory, storage
from koi.configured import Configured
from koi.errors import CheckpointError
from koi.inner.optimizers.recognition import update_rule
from koi.phi.shards import local
from koi.ranks.group import Ranks
from koi.training import checkpoint
from koi.training.checkpoint import Data, Saved
from koi.training.folder import Folder
from koi.training.state import TrainingState

_SUMS = "sha256.json"
_MAX_SUMS = 2**26  # bytes of that list


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
    _other_suffix, _kind, _other_kind = ".safetensors", "sharded", "whole"
    _ranks: Ranks

    def attach(self, ranks: Ranks) -> None:
        """Remember the ranks that write."""
        self._ranks = ranks

    def in_words(self) -> dict[str, str]:
        """Return what all ranks must have been given alike."""
        return {"checkpoint_dir": "given", **self._asked}

    def prepare(self) -> None:
        """Make the folder, lock it, and try whether all ranks can write there.

        Raises:
            CheckpointError: it cannot be used, or is not the same folder for all.
        """
        with self._ranks.agreed():
            if self._ranks.first:
                super().prepare()
        token = self._ranks.value_of_first(str(uuid.uuid4()))
        names = [f".iteration-{token}-{rank}.tmp" for rank in range(self._ranks.size)]
        own = self._path / names[self._ranks.rank]
        try:
            with self._ranks.agreed():
                try:
                    own.write_bytes(b"")
                except OSError as error:
                    raise self._not_shared(error.strerror or str(error)) from error
            with self._ranks.agreed():
                if not all((self._path / name).exists() for name in names):
                    raise self._not_shared("what others write there is not seen here")
        finally:
            with suppress(OSError):
                own.unlink(missing_ok=True)

    def _not_shared(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint_dir {self._path} is not one folder in which all ranks can save their "
            f"shards of φ ({why}): give one that they share"
        )

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

        path = self.file(number)
        begun = path.with_name(f".{path.name}.tmp")
        with self._ranks.agreed():
            data, parts = taken_out(koi, checkpoint.contents(koi, state))
            if self._ranks.first:
                self._check_no_link(begun)
                shutil.rmtree(begun, ignore_errors=True)  # of a training that was killed
        content = self._ranks.from_first(storage.pack(data))
        tensors: dict[str, Any] = {"koi": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        params = list(koi.model.parameters())
        for place, (value, i) in enumerate(parts):
            tensors[f"shard-{place}"] = _global(value, params[i])
        own: dict[str, str] = {}
        with self._written_by_all(path):
            dcp.state_dict_saver.save(tensors, checkpoint_id=begun)
            written = begun.glob(f"__{self._ranks.rank}_*")
            own = {each.name: _digest(each) for each in written}
        sums = {name: sha for each in self._ranks.values(own) for name, sha in each.items()}
        with self._written_by_all(path):
            if self._ranks.first:
                _complete(begun, sums)
                shutil.rmtree(path, ignore_errors=True)
                begun.rename(path)

    def read(self, koi: Configured, number: int) -> Saved:
        """Read a checkpoint, of whatever number of ranks: each takes the rows that it holds.

        Raises:
            CheckpointError: it cannot be read, by one of the ranks.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.tensor import empty

        path = self.file(number)
        with self._read_by_all(path):
            self._check_sums(path)
            stored: Any = dcp.filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
            whole = {"koi": torch.empty(stored["koi"].size, dtype=torch.uint8)}
        with self._read_by_all(path):
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
        with self._read_by_all(path):
            dcp.state_dict_loader.load(tensors, checkpoint_id=path)
            parts = [local(tensor) for tensor in tensors.values()]
            return checkpoint.saved_from(put_in(koi, data, parts), path)
        raise AssertionError

    def _read_by_all(self, path: Path) -> AbstractContextManager[None]:
        """Return a block whose error is that of all ranks, who look for an earlier one together."""
        mend = "use an earlier one, or give the model that it was made with"
        return self._by_all(f"the checkpoint {path} cannot be read", mend, ends=False)

    def _written_by_all(self, path: Path) -> AbstractContextManager[None]:
        """Return a block whose error is that of all ranks, none of which saves then."""
        mend = (
            "φ and earlier checkpoints are as they were; make room or choose another folder, and "
            "go on"
        )
        return self._by_all(f"the checkpoint {path} cannot be written", mend, ends=True)

    @contextmanager
    def _by_all(self, problem: str, mend: str, ends: bool) -> Iterator[None]:
        import torch.distributed.checkpoint as dcp

        with self._ranks.agreed(ends):
            try:
                yield
            except CheckpointError:
                raise
            except (Exception, dcp.api.CheckpointException) as error:
                why = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{problem} ({why}): {mend}") from error

    def _check_sums(self, path: Path) -> None:
        """Compare the files with the list of their checksums, each rank its part of them.

        Raises:
            CheckpointError: one of them is missing, or not as it was written.
        """
        sums = json.loads(files.content_of(path / _SUMS, _MAX_SUMS))
        for name in sorted(sums)[self._ranks.rank :: self._ranks.size]:
            if _digest(path / name) != sums[name]:
                raise CheckpointError(
                    f"the checkpoint {path} is damaged (the checksum of {name} does not match; it "
                    "was cut or changed after it was written): use an earlier one"
                )

    def remove_old(self) -> None:
        """Remove all but the last two good ones, and what was never completed."""
        if self._ranks.first:
            super().remove_old()

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def _listed(self) -> list[int]:
        """Return those that rank 0 sees."""
        return self._ranks.value_of_first(self._numbers() if self._ranks.first else [])


def _complete(begun: Path, sums: dict[str, str]) -> None:
    """Add the list of checksums to what all ranks have written.

    Raises:
        OSError: not all of it is there.
    """
    sums[".metadata"] = _digest(begun / ".metadata")
    missing = [name for name in sums if not (begun / name).is_file()]
    if missing:
        raise OSError(f"{', '.join(missing)} of other ranks are not in this folder")
    files.replace_file(begun / _SUMS, json.dumps(sums).encode())


def _digest(path: Path) -> str:
    with files.opened(path) as file:
        return memory.checksum(file)


def _global(rows: Tensor, param: Any) -> Any:
    """Return a tensor's rows on this rank as a part of the tensor that all ranks hold."""
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    form = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(rows, mesh, placements, run_check=False, **form)
