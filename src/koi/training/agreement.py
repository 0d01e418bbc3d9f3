"""Whether a checkpoint fits the model and the settings that training is to go on with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from koi.algorithms import schedule_of
from koi.phi.arithmetic import in_words
from koi.settings import is_code, shown

Data = dict[str, Any]


def tensors_of(model: nn.Module) -> dict[str, str]:
    """Return what each parameter and buffer of a model is, in words.

    >>> tensors_of(nn.Linear(3, 1, bias=False))
    {'weight': 'a parameter of shape (1, 3), float32'}
    """
    params = {
        name: f"{'a parameter' if p.requires_grad else 'a frozen parameter'} of {in_words(p)}"
        for name, p in model.named_parameters()
    }
    return params | {name: f"a buffer of {in_words(b)}" for name, b in model.named_buffers()}


def arguments_of(optimizer: torch.optim.Optimizer) -> Data:
    """Return the class of an optimizer and those of its arguments that are data."""
    kind, plain = type(optimizer), bool | int | float | str | None
    arguments = {
        name: value
        for name, value in optimizer.defaults.items()
        if isinstance(value, plain)
        or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value))
    }
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **arguments}


def different_tensors(
    there: dict[str, str], here: dict[str, str], values: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield what differs between the model of a checkpoint, its values too, and the one here."""
    for name, value in values.items():
        if f" of {in_words(value)}" not in there.get(name, ""):
            yield f"model: {name} is {in_words(value)} and said to be {there.get(name, 'missing')}"
    for name in dict.fromkeys((*there, *here)):
        if here.get(name) != there.get(name):
            yield (
                f"model: {name} is {there.get(name, 'missing')} in the checkpoint, "
                f"{here.get(name, 'missing')} here"
            )


def different_settings(there: Data, here: Data) -> Iterator[str]:
    """Yield every setting that differs; of code only whether it is some."""
    algorithm, epsilon = there["algorithm"], there["meta_step_size"]
    if not is_code(algorithm):
        epsilon = schedule_of(epsilon, algorithm, there["step_size"])
    for name, stored in there.items():
        if name not in here:
            yield f"{name}: {shown(stored)} in the checkpoint, no setting of this Koi"
            continue
        given = here[name]
        if stored == given or (is_code(stored) and is_code(given)):
            continue
        # a constant ε does not depend on how many meta-iterations there will be
        if name == "num_iterations" and isinstance(epsilon, int | float):
            continue
        yield f"{name}: {shown(stored)} in the checkpoint, {shown(given)} here"


def different_optimizer(
    what: str, there: Data, here: Data, free: Collection[str] = ()
) -> Iterator[str]:
    """Yield what differs in the class and arguments of an optimizer, but for the ``free`` ones."""
    if there["class"] != here["class"]:
        yield f"{what}: gave {there['class']} for the checkpoint, {here['class']} here"
        return
    for name in there:  # of another torch it may have others
        if name in here and name not in free and there[name] != here[name]:
            yield f"{what}: {name} = {there[name]!r} in the checkpoint, {here[name]!r} here"
