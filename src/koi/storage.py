"""One file that holds nested data, written wholly or not at all, read without running its code.

The file is a safetensors file: tensors are tensors, everything else is JSON in its header's
metadata. The header begins with a SHA-256 of the whole file, taken with zeros in its own place, so
that a file that was cut or changed is found out. Nothing in it is ever executed.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from koi.errors import CheckpointError

# Every format begins with the checksum, so that an intact file of a newer Koi is told from damage.
FORMAT = 1

_ZEROS = b"0" * hashlib.sha256().digest_size * 2
_START = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + len(_ZEROS))
_MAX_HEADER = 100_000_000  # safetensors' own limit

# The names that safetensors gives to types.
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write nested data to ``path``: the whole file or, on any failure, none.

    The file takes its name only when its content has reached the disk, so that a process that is
    killed or a machine that loses power at any moment leaves the earlier file of that name.

    Args:
        path: the file; its folder must exist.
        data: tensors, numbers, strings, None, bytes, types of torch, NumPy's arrays, and lists,
            tuples, sets and dictionaries of these.

    Raises:
        CheckpointError: the file cannot be written, or ``data`` holds what a file cannot.
    """
    pieces = pack(data)
    try:
        replace_file(path, pieces)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({error.strerror or error}): φ and earlier "
            "checkpoints are as they were; make room or choose another folder, and go on"
        ) from error


def replace_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that takes its name once its content has reached the disk, or not at all.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` has written, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of another program or of a newer Koi.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error.strerror or error}): give the name of "
            "a file that koi.save or koi.train wrote"
        ) from error
    return unpack(content, path)


def pack(data: Mapping[str, Any]) -> Iterator[bytes]:
    """Return nested data as the content of a file, in pieces.

    Raises:
        CheckpointError: ``data`` holds what a file cannot.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(data, "", tensors))
    return _pieces(text, tensors)


def unpack(content: bytes, path: Path | str) -> dict[str, Any]:
    """Return what `pack` was given; ``path`` is what errors name.

    Raises:
        CheckpointError: the content is damaged, of another program or of a newer Koi.
    """
    metadata = _metadata(content)
    if metadata is None:
        raise CheckpointError(
            f"{path} is no checkpoint of Koi, or its beginning is damaged: give a file that "
            "koi.save or koi.train wrote, or an earlier one"
        )
    if _digest(content) != _stored(content):
        raise CheckpointError(
            f"the checkpoint {path} is damaged (its checksum does not match; it was cut or "
            "changed after it was written): use an earlier one"
        )
    if metadata.get("koi_format") != str(FORMAT):
        raise CheckpointError(
            f"the checkpoint {path} has format {metadata.get('koi_format')} and this Koi reads "
            f"format {FORMAT}: read it with the Koi that wrote it, or a newer one"
        )
    try:
        data = decode(json.loads(metadata["koi"]), safetensors.torch.load(content))
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be understood ({error}): use an earlier one"
        ) from error
    return dict(data)


def temporary_name(target: Path) -> Path:
    """Return where this process writes a file before it takes its name."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


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
        if value.dtype in _TYPE_NAMES and value.layout == torch.strided and not value.is_meta:
            name = where.lstrip(".")
            while name in tensors:  # two ways through dictionaries can read the same
                name += "'"
            tensors[name] = value
            return {"tensor": name}
    elif isinstance(value, list):
        return [encode(part, f"{where}[{i}]", tensors) for i, part in enumerate(value)]
    elif isinstance(value, tuple | set | frozenset):
        parts = [encode(part, f"{where}[{i}]", tensors) for i, part in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "set": parts}
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


def _pieces(text: str, tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """Yield the file's content: the size of the header, the header, each tensor's bytes."""
    # like the library, wide types first: every tensor then begins where its type asks it to
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    metadata = {"sha256": _ZEROS.decode(), "koi_format": str(FORMAT), "koi": text}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise CheckpointError(
            f"a checkpoint cannot hold {len(encoded)} bytes that are no tensors: let the "
            "state_dict of the task distribution give tensors"
        )
    start = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(start)
    for name in order:
        digest.update(bytes_of(tensors[name]))
    yield start[: _DIGEST.start] + digest.hexdigest().encode() + start[_DIGEST.stop :]
    for name in order:
        yield bytes_of(tensors[name])


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's values; without NumPy, which need not be installed."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def _metadata(content: bytes) -> dict[str, Any] | None:
    """Return the metadata of a Koi file, None if it is something else."""
    size = int.from_bytes(content[:8], "little")
    if content[8 : _DIGEST.start] != _START or size > _MAX_HEADER:
        return None
    try:
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) and "koi" in metadata else None


def _stored(content: bytes) -> str:
    return content[_DIGEST].decode("ascii", "replace")


def _digest(content: bytes) -> str:
    view = memoryview(content)
    digest = hashlib.sha256(view[: _DIGEST.start])
    digest.update(_ZEROS)
    digest.update(view[_DIGEST.stop :])
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)
