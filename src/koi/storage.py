"""One file that holds nested data, written wholly or not at all, read without running its code.

The file is a safetensors file: tensors are tensors, everything else is JSON in its header's
metadata. The header begins with a SHA-256 of the whole file, taken with zeros in its own place, so
that a file that was cut or changed is found out. Nothing in it is ever executed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec
from torch import Tensor

from koi import memory
from koi.errors import CheckpointError
from koi.files import mend, opened, replacing

# Every format begins with the checksum, so that an intact file of a newer Koi is told from damage.
FORMAT = 1

_ZEROS = b"0" * hashlib.sha256().digest_size * 2
_START = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + len(_ZEROS))
_MAX_HEADER = 100_000_000  # safetensors' own limit


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write nested data to ``path``: the whole file or, on any failure, none.

    The file takes its name only when its content has reached the disk, so that a process that is
    killed or a machine that loses power at any moment leaves the earlier file of that name.
    Tensors go there in pieces, and each is gone through once.

    Args:
        path: the file; its folder must exist.
        data: tensors, numbers, strings, None, bytes, types of torch, NumPy's arrays, and lists,
            tuples, sets and dictionaries of these.

    Raises:
        CheckpointError: the file cannot be written, or ``data`` holds what a file cannot.
    """
    start, tensors = _start_of(data)
    try:
        with replacing(path) as file:
            _write(file, start, tensors)
    except OSError as error:
        raise CheckpointError(
            f"the file {path} cannot be written ({error.strerror or error}): φ and earlier "
            f"checkpoints are as they were; {mend(error)}"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Return what `write` has written, tensors on the CPU.

    Sizes are compared with the file's before anything is made of them: what is read takes no more
    memory than the file has bytes, and what it describes beside tensors.

    Raises:
        CheckpointError: the file is missing, damaged, of another program or of a newer Koi, or
            larger than this machine's memory.
    """
    try:
        with opened(path) as file:
            return _read(file, path)
    except OSError as error:
        raise CheckpointError(
            f"the file {path} cannot be read ({error.strerror or error}): give the name of one "
            "that koi.save or koi.train wrote"
        ) from error


def pack(data: Mapping[str, Any]) -> bytes:
    """Return nested data as the content of a file.

    Raises:
        CheckpointError: ``data`` holds what a file cannot.
    """
    file = io.BytesIO()
    _write(file, *_start_of(data))
    return file.getvalue()


def unpack(content: bytes, path: Path | str) -> dict[str, Any]:
    """Return what `pack` was given; ``path`` is what errors name.

    Raises:
        CheckpointError: the content is damaged, of another program or of a newer Koi.
    """
    return _read(io.BytesIO(content), path)


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON can hold it, gathering its tensors.

    Raises:
        CheckpointError: it holds something else, named by where it lies.

    >>> encode({"a": (1, None)}, "", {})
    {'dict': [['a', {'tuple': [1, None]}]]}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        pairs = value.dtype == torch.complex128  # which safetensors has not
        if (pairs or _type_name(value.dtype)) and memory.is_plain(value):
            name = where.lstrip(".")
            while name in tensors:  # two ways through dictionaries can read the same
                name += "'"
            tensors[name] = torch.view_as_real(value.detach().resolve_conj()) if pairs else value
            return {"pairs" if pairs else "tensor": name}
    elif isinstance(value, list):
        return [encode(part, f"{where}[{i}]", tensors) for i, part in enumerate(value)]
    elif isinstance(value, tuple | set | frozenset):
        return {"tuple" if isinstance(value, tuple) else "set": encode([*value], where, tensors)}
    elif isinstance(value, Mapping):
        return {
            "dict": [
                [encode(key, f"{where}.key", tensors), encode(part, f"{where}.{key}", tensors)]
                for key, part in value.items()
            ]
        }
    elif isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    elif isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    elif type(value).__module__ == "numpy" and value.dtype.kind in "biufc":
        contents = base64.b64encode(value.tobytes()).decode()
        return {"numpy": [value.dtype.str, list(value.shape), contents]}
    kind = str(value.dtype) + " tensor" if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(
        f"a checkpoint cannot hold {where.lstrip('.')}, of type {kind}: it can hold tensors, "
        "numbers, strings, and lists and dictionaries of these"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `encode` was given.

    >>> decode(encode({3: (1, [b"x"])}, "", {}), {})
    {3: (1, [b'x'])}
    """
    if isinstance(value, list):
        return [decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "pairs":
        return torch.view_as_complex(tensors[inside])
    if kind == "dtype":
        dtype = getattr(torch, inside)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch.{inside} is no type")
        return dtype
    if kind == "bytes":
        return base64.b64decode(inside)
    if kind == "numpy":
        import numpy

        dtype, shape, contents = inside
        array = numpy.frombuffer(base64.b64decode(contents), dtype).reshape(shape).copy()
        return array if shape else array[()]
    parts = decode(inside, tensors)
    if kind == "dict":
        return dict(parts)
    return {"tuple": tuple, "set": set}[kind](parts)


def _type_name(dtype: torch.dtype) -> str | None:
    """Return what safetensors calls a type, None if it has none for it, or packs two in a byte."""
    try:
        name = str(dtype).removeprefix("torch.")
        spec = TensorSpec(dtype=name, shape=[1], data_ptr=0, data_len=0)
    except SafetensorError:
        return None
    return spec.dtype if spec.shape == [1] else None


_TYPES = {_type_name(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def _start_of(data: Mapping[str, Any]) -> tuple[bytes, list[Tensor]]:
    """Return what a file begins with, zeros in the checksum's place, and the tensors to follow."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(data, "", tensors))
    # like the library, wide types first: every tensor then begins where its type asks it to
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    metadata = {"sha256": _ZEROS.decode(), "koi_format": str(FORMAT), "koi": text}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        tensor = tensors[name]
        start, offset = offset, offset + tensor.nbytes
        header[name] = {
            "dtype": _type_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, offset],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise CheckpointError(
            f"a checkpoint cannot hold {len(encoded)} bytes that are no tensors: let the "
            "state_dict of the task distribution give tensors"
        )
    return len(encoded).to_bytes(8, "little") + encoded, [tensors[name] for name in order]


def _write(file: io.BufferedIOBase, start: bytes, tensors: Iterable[Tensor]) -> None:
    """Write a file's content in one pass, and its checksum where there were zeros.

    The library's own writer takes tensors that are contiguous and on the CPU, all of them copied
    there before it begins, and puts the metadata, and so the checksum, in any order.
    """
    digest = hashlib.sha256(start)
    file.write(start)
    for tensor in tensors:
        for piece in memory.pieces_of(tensor):
            digest.update(piece)
            file.write(piece)
    file.seek(_DIGEST.start)
    file.write(digest.hexdigest().encode())


def _read(file: io.BufferedIOBase, path: Path | str) -> dict[str, Any]:
    """Return what `_write` wrote. Nothing in it is believed before the checksum is right."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_DIGEST.stop)
    if start[8 : _DIGEST.start] != _START:
        raise CheckpointError(
            f"{path} is no checkpoint of Koi, or its beginning is damaged: give a file that "
            "koi.save or koi.train wrote, or an earlier one"
        )
    if size > memory.of_this_machine():  # as a file with holes can be, which takes no place
        raise CheckpointError(
            f"the checkpoint {path} has {size:,} bytes, more than this machine has memory: use an "
            "earlier one, or a larger machine"
        )
    length = int.from_bytes(start[:8], "little")
    whole = length <= min(size - 8, _MAX_HEADER)
    if not whole or _digest(file, start) != start[_DIGEST]:
        raise CheckpointError(
            f"the checkpoint {path} is damaged (its checksum does not match; it was cut or "
            "changed after it was written): use an earlier one"
        )
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata.get("koi_format") != str(FORMAT):
            raise CheckpointError(
                f"the checkpoint {path} has format {metadata.get('koi_format')} and this Koi reads "
                f"format {FORMAT}: read it with the Koi that wrote it, or a newer one"
            )
        _check_places(header, size - file.tell())
        begin = file.tell()
        tensors = {name: _tensor(file, begin, **entry) for name, entry in header.items()}
        return dict(decode(json.loads(metadata["koi"]), tensors))
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be understood ({error}): use an earlier one"
        ) from error


def _digest(file: io.BufferedIOBase, start: bytes) -> bytes:
    """Return the checksum of a file of which ``start`` has been read."""
    return memory.checksum(file, start[: _DIGEST.start] + _ZEROS).encode()


def _check_places(header: Mapping[str, Any], size: int) -> None:
    """Check that tensors lie side by side and fill what follows the header, as the format wants.

    Raises:
        ValueError: they do not, so that a small file could become many large tensors.
    """
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        numbers = all(type(length) is int and length >= 0 for length in shape)
        needed = math.prod(shape) * _TYPES[entry["dtype"]].itemsize if numbers else None
        if start != end or needed != stop - start:
            raise ValueError(f"the tensor {name} is not as large as its place")
        end = stop
    if end != size:
        raise ValueError(f"tensors have {end} bytes and the file has {size} for them")


def _tensor(
    file: io.BufferedIOBase, begin: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> Tensor:
    """Return a tensor of a file, or of what was sent, read into memory of its own on the CPU.

    The library has a reader for each, and they differ: the one of files maps them, or makes empty
    tensors on the default device; the one of bytes does not know all types.
    """
    tensor = torch.empty(shape, dtype=_TYPES[dtype], device="cpu")
    file.seek(begin + data_offsets[0])
    for piece in memory.pieces_of(tensor):
        if file.readinto(piece) != len(piece):
            raise ValueError("it ends within a tensor")
    return tensor
