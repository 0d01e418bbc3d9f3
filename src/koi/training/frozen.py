"""Frozen parameters, which no checkpoint holds: a digest tells whether they are the same ones.

A large frozen part is gone through once, at a gigabyte a second or so. After that each save looks
at what tells of a change: the tensor, where it lies, torch's count of what was done in place, and
some values spread over it, as what is done through ``.data`` is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from koi import memory

_SIZE = 16  # bytes of a digest
_SAMPLE = 1024  # values that are looked at
_NAMED = 4  # parameters that a message names
_known: Any = WeakTensorKeyDictionary()  # a parameter -> what tells of a change, and its digest


def digests(params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of the bytes of each parameter.

    Those without memory of their own, such as wrappers around quantised weights, are left out.

    >>> import torch
    >>> list(digests({"weight": torch.zeros(2)}))
    ['weight']
    """
    return {name: _digest_of(p) for name, p in params.items() if memory.is_plain(p)}


def different_frozen(there: Mapping[str, str], params: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield which frozen parameters are not those of a checkpoint, if some are not."""
    here = digests(params) if there else {}
    names = [name for name, digest in there.items() if here.get(name, digest) != digest]
    if not names:
        return
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    yield (
        f"model: the frozen parameters {', '.join(names[:_NAMED])}{more} had other values, which "
        "no checkpoint holds: seed torch before the model is built, or load the weights it had"
    )


def _digest_of(param: Tensor) -> str:
    values = param.detach().reshape(-1)
    some = values[:: max(1, len(values) // _SAMPLE)]
    version = None if param.is_inference() else param._version
    state = param.data_ptr(), version, memory.digest(some, size=_SIZE)
    if param not in _known or _known[param][0] != state:
        _known[param] = state, memory.digest(param, size=_SIZE).hex()
    digest: str = _known[param][1]
    return digest
