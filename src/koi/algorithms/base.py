"""What an algorithm is: what each task gives, and how φ moves by the mean of that.

Everything else (the inner loop, buffers, moments, chunks, ranks) is the same for all. An algorithm
is written for one task, in tensor arithmetic, and runs as it stands in every engine: one task at a
time, over many at once under ``torch.func.vmap``, and inside a graph of ``torch.compile``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from koi.errors import ConfigurationError
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.schedules import Schedule, linear


class Adaptation(NamedTuple):
    """What the inner loop leaves of one task: lists with a tensor for each parameter, in one order.

    Attributes:
        start: φ.
        end: φ̃, the parameters after the last inner step.
        path: φ, …, φ̃, the parameters before the first step and after each: num_steps + 1 such
            lists. Empty, but for an algorithm with ``trajectory``.
        gradient: of the query loss at φ̃. Empty, but for an algorithm with ``query_gradient``.
    """

    start: Tensors
    end: Tensors
    path: list[Tensors]
    gradient: Tensors


@dataclass(frozen=True)
class Algorithm(ABC):
    """The base of `TowardsPoint` and `AgainstGradient`, of which algorithms are made.

    An algorithm is a frozen dataclass: its fields are its settings, so that it compares and prints
    as data. What it asks of the inner loop, it says in these attributes of its class:

    ``trajectory``: the parameters after each inner step (memory for all of them).
    ``query_gradient``: the gradient of the loss on the task's query set, or on what the last inner
    step saw where there is none, after the last step.
    ``second_order``: that gradient with respect to φ, through all inner steps, instead of φ̃.
    """

    trajectory: ClassVar[bool] = False
    query_gradient: ClassVar[bool] = False
    second_order: ClassVar[bool] = False
    _from_elsewhere: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note whose it is."""
        super().__init_subclass__(**kwargs)
        cls._from_elsewhere = cls.__module__.partition(".")[0] != "koi"

    @abstractmethod
    def gives(self, task: Adaptation) -> Tensors:
        """Return what one task gives, a tensor for each parameter; change none in place."""

    @abstractmethod
    def meta_gradient(self, phi: Tensors, mean: Tensors, /) -> Tensors:
        """Return the gradient that a meta-optimizer is fed, of the mean over tasks."""

    @abstractmethod
    def move_(self, phi: Tensors, mean: Tensors, epsilon: float) -> None:
        """Move φ in place by ε, where there is no meta-optimizer."""

    @abstractmethod
    def default_meta_step_size(self, step_size: float, /) -> float | Schedule:
        """Return what ε is where the user gives none."""


class TowardsPoint(Algorithm):
    """Each task gives a point, and φ goes a part of the way to their mean.

    φ ← φ + ε · (mean − φ), exactly nowhere at ε = 0 and exactly there at ε = 1; a meta-optimizer
    is fed φ − mean (Nichol et al., arXiv 1803.02999, section 2.1).

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Halfway(TowardsPoint):
    ...     share: float = 0.5
    ...
    ...     def gives(self, task):
    ...         pairs = zip(task.start, task.end, strict=True)
    ...         return [start + self.share * (end - start) for start, end in pairs]
    >>> Halfway(), Halfway() == Halfway(0.25)
    (Halfway(share=0.5), False)
    """

    def meta_gradient(self, phi: Tensors, mean: Tensors) -> Tensors:
        """Return φ − mean."""
        return arithmetic.difference(phi, mean)

    def move_(self, phi: Tensors, mean: Tensors, epsilon: float) -> None:
        """φ ← φ + ε · (mean − φ)."""
        arithmetic.interpolate_(phi, mean, epsilon)

    def default_meta_step_size(self, _: float) -> Schedule:
        """Return ε from 1 to 0: by the end φ no longer follows single tasks."""
        return linear(1.0, 0.0)


class AgainstGradient(Algorithm):
    """Each task gives a gradient, and φ goes against their mean.

    φ ← φ − ε · mean; a meta-optimizer is fed the mean.
    """

    def meta_gradient(self, _: Tensors, mean: Tensors) -> Tensors:
        """Return the mean as it is."""
        return mean

    def move_(self, phi: Tensors, mean: Tensors, epsilon: float) -> None:
        """φ ← φ − ε · mean."""
        torch._foreach_add_(phi, mean, alpha=-epsilon)

    def default_meta_step_size(self, step_size: float) -> float:
        """Return the inner loop's rate: ε is that of a gradient, too."""
        return step_size


def given(
    algorithm: Algorithm, start: Tensors, end: Tensors, path: list[Tensors], gradient: Tensors
) -> Tensors:
    """Return what one task gives, checked; the arguments are the fields of `Adaptation`.

    Raises:
        ConfigurationError: it is not a tensor like each parameter.
    """
    if algorithm._from_elsewhere:  # what changes its start in place must not reach φ
        start = [tensor.clone() for tensor in start]
    tensors: Any = algorithm.gives(Adaptation(start, end, path, gradient))
    if not isinstance(tensors, list | tuple) or len(tensors) != len(start):
        found = f"{len(tensors)} of them" if isinstance(tensors, list | tuple) else repr(tensors)
        raise ConfigurationError([_wanted(algorithm, found)])
    for tensor, param in zip(tensors, start, strict=True):
        if not (
            isinstance(tensor, Tensor)
            and tensor.shape == param.shape
            and tensor.dtype == param.dtype
        ):
            is_tensor = isinstance(tensor, Tensor)
            what = arithmetic.in_words(tensor) if is_tensor else type(tensor).__name__
            raise ConfigurationError(
                [_wanted(algorithm, f"{what} for a parameter of {arithmetic.in_words(param)}")]
            )
    return list(tensors)


def _wanted(algorithm: Algorithm, found: str) -> str:
    return (
        f"{type(algorithm).__name__}.gives returned {found}: it must return a list with a tensor "
        "of the shape and type of each parameter, in the order of task.start"
    )
