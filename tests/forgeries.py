"""Checkpoints with a right checksum in which something else stands, of every kind of learner."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from koi import Koi, KoiError, storage
from toys import Regressions, small_net

LENGTH = 4  # meta-iterations; the checkpoint is of three
SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": LENGTH, "check": False}


class Counting(Regressions):
    """A distribution with a state."""

    count = 0

    def sample(self):
        self.count += 1
        return super().sample()

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Sum:
    """A callback with a state."""

    total = 0.0

    def __call__(self, koi, record):
        self.total += record.loss_after

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def with_buffers():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def momentum(params, lr):
    return torch.optim.SGD(params, lr, momentum=0.9)


def rmsprop(params, lr):
    return torch.optim.RMSprop(params, lr)


def meta_adam(params):
    return torch.optim.Adam(params, lr=0.01)


def meta_sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


class Kind(NamedTuple):
    """A learner, and what its training has."""

    settings: dict[str, Any]
    make: Any = small_net
    validated: bool = False
    stateful: bool = False


LEARNERS = {
    "adam": Kind({"inner_optimizer": "adam", "seed": 0}),
    "momentum": Kind({"inner_optimizer": momentum, "seed": 0, "average": 0.9}),
    "rmsprop": Kind({"inner_optimizer": rmsprop, "seed": 0}),
    "meta-adam": Kind({"meta_optimizer": meta_adam, "seed": 0}),
    "meta-sgd": Kind({"meta_optimizer": meta_sgd, "seed": 0}),
    "layer": Kind(
        {"algorithm": "fomaml", "learn_step_size": "layer", "average": 0.5, "seed": 0},
        validated=True,
    ),
    "parameter": Kind(
        {"algorithm": "maml", "learn_step_size": "parameter", "meta_optimizer": meta_adam}
        | {"seed": 0}
    ),
    "no seed": Kind({}, stateful=True),
    "buffers": Kind({"inner_optimizer": "adam", "seed": 0}, with_buffers, validated=True),
    "half": Kind({"autocast": torch.float16, "seed": 0}),
}


def given(kind: Kind) -> tuple[Any, dict[str, Any]]:
    """Return tasks and the other arguments of a training."""
    callbacks = [Sum()] if kind.stateful else []
    validation = {"validate": Regressions(), "validate_every": 1} if kind.validated else {}
    return (Counting() if kind.stateful else Regressions()), {"callbacks": callbacks, **validation}


def checkpoint_of(kind: Kind, folder: Path) -> dict[str, Any]:
    """Return what the checkpoint of a training holds that was stopped after three iterations."""
    torch.manual_seed(0)
    koi = Koi(kind.make(), **{**SETTINGS, **kind.settings})
    tasks, options = given(kind)
    options["callbacks"].append(lambda koi, record: koi.STOP if record.iteration == 2 else None)
    koi.train(tasks, checkpoint_dir=folder, **options)
    return storage.read(folder / "iteration-000000003.safetensors")


def go_on_from(kind: Kind, path: Path) -> Koi:
    """Use a checkpoint in every way."""
    code = {n: v for n, v in kind.settings.items() if n.endswith("optimizer") and callable(v)}
    koi = Koi.load(path, kind.make(), **code)
    koi.num_iterations = koi.iteration + 1
    tasks, options = given(kind)
    koi.train(tasks, **options)
    koi.evaluate(Regressions(), 1)
    list(koi.history)
    if koi.average is not None:
        koi.averaged()
    koi.state_dict()
    return koi


def answer(kind: Kind, path: Path, data: dict[str, Any]) -> str | None:
    """Write and use a checkpoint; return what came that is neither a success nor an answer.

    An answer is one of Koi's own errors; where it comes of reading it must name the file.
    """
    try:
        storage.write(path, data)
    except KoiError:
        return None  # no such file can be
    try:
        go_on_from(kind, path)
    except KoiError:
        return None
    except Exception as error:
        return repr(error)
    return None


def places(data: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something stands in nested data; long lists are one thing.

    What tasks and callbacks keep is theirs, and theirs to check.
    """
    if where:
        if where[0] in ("tasks", "callbacks") and data is not None:
            return
        yield where
    inside = data.items() if isinstance(data, dict) else ()
    if isinstance(data, list | tuple) and len(data) < 20:
        inside = enumerate(data)
    for key, part in inside:
        yield from places(part, (*where, key))


class Missing:
    """Stands for nothing at all."""


def edited(data: Any, where: tuple[Any, ...], value: Any) -> Any:
    """Return nested data with something else at one place."""
    if not where:
        return value
    key, *rest = where
    if isinstance(data, dict):
        data = dict(data)
        if value is Missing and not rest:
            del data[key]
            return data
        return {**data, key: edited(data.get(key), tuple(rest), value)}
    parts = list(data)
    if value is Missing and not rest:
        del parts[key]
    else:
        parts[key] = edited(parts[key], tuple(rest), value)
    return type(data)(parts)


def at(data: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        data = data[key]
    return data


def instead_of(there: Any) -> Iterator[Any]:
    """Yield what could stand at a place in the place of what stands there."""
    yield from (None, -1, 0.5, 2**70, math.nan, "x", [], {}, (1,), {0: 1}, torch.zeros(3), Missing)
    if isinstance(there, torch.Tensor):
        yield from (there.double(), there.long(), there.bool(), there.to(torch.complex64))
        yield from (there.reshape(-1)[:1], there.unsqueeze(0), there.new_zeros(0))
        if there.is_floating_point():
            yield from (torch.full_like(there, math.nan), -there - 1)
    if isinstance(there, list | tuple) and there:
        yield from (type(there)([*there, there[-1]]), type(there)(there[::-1]))
    if isinstance(there, dict):
        yield from ({**there, "extra": 1}, {f"{key}x": part for key, part in there.items()})
    if type(there) is int:
        yield from (there + 1, there + 20, float(there))


def forged(data: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every place of a checkpoint with each value that could stand there."""
    for where in places(data):
        for value in instead_of(at(data, where)):
            yield where, copy.deepcopy(value)
