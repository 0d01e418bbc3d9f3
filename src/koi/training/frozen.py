"""Frozen parameters, which no checkpoint holds: a digest tells whether they are the same ones.

A large frozen part is gone through once, at a gigabyte a second or so. After that each save looks
at what tells of a change: the tensor, where it lies, torch's count of what was done in place, and
some values spread over it, as what is done through ``.data`` is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from koi import memory

_SIZE = 16  # bytes of a digest
_SAMPLE = 1024  # values that are looked at
_NAMED = 4  # parameters that a message names
_known: Any = WeakTensorKeyDictionary()  # a parameter -> what tells of a change, and its digest


def digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of the bytes of each frozen parameter.

    Those without memory of their own, such as wrappers around quantised weights, are left out.

    >>> model = nn.Linear(2, 1)
    >>> _ = model.weight.requires_grad_(False)
    >>> list(digests(model))
    ['weight']
    """
    return {
        name: _digest_of(p)
        for name, p in model.named_parameters()
        if not p.requires_grad and memory.is_plain(p)
    }


def different_frozen(there: Mapping[str, str], model: nn.Module) -> Iterator[str]:
    """Yield which frozen parameters of ``model`` are not those of a checkpoint, if some are not."""
    here = digests(model) if there else {}
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
