"""Arithmetic on lists of tensors, and which tensors of a module a task adapts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from koi.errors import ModelError

Tensors = list[Tensor]


@dataclass(frozen=True)
class Learned:
    """The names of what a task adapts: parameters by gradient, floating-point buffers by use.

    Parameters count once however many names they are tied to; frozen ones are left out. Integer
    buffers, such as BatchNorm's batch counter, belong to the module and stay as they are.
    """

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Learned:
        """Read the names off ``module``.

        Raises:
            ModelError: no parameter can learn, or lazy parameters have no shape yet.
        """
        named = dict(module.named_parameters())
        everything = (*named.items(), *module.named_buffers())
        lazy = [name for name, tensor in everything if is_lazy(tensor)]
        if lazy:
            raise ModelError(
                f"the model has lazy parameters or buffers without a shape ({', '.join(lazy)}): "
                "run one batch through it before giving it to Koi"
            )
        params = tuple(name for name, p in named.items() if p.requires_grad)
        if not params:
            raise ModelError(
                f"the model has no parameter that can learn ({len(named)} parameters, none with "
                "requires_grad): give it at least one, or unfreeze some"
            )
        floating = {n: b.is_floating_point() for n, b in module.named_buffers()}
        buffers = tuple(name for name, moves in floating.items() if moves)
        return cls(params, buffers, tuple(name for name, moves in floating.items() if not moves))

    def params_of(self, module: nn.Module) -> Tensors:
        """Return the learned parameters of ``module``, not copies, in this order."""
        return [module.get_parameter(name) for name in self.params]

    def buffers_of(self, module: nn.Module) -> Tensors:
        """Return the adapted buffers of ``module``, not copies, in this order."""
        return [module.get_buffer(name) for name in self.buffers]

    def constants_of(self, module: nn.Module) -> Tensors:
        """Return the integer buffers of ``module``, not copies, in this order."""
        return [module.get_buffer(name) for name in self.constants]


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` to work on.

    Raises:
        ModelError: the module holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be copied ({error}): keep computed tensors (so use "
            "torch.nn.utils.parametrizations, not the older weight_norm hooks), generators and "
            "locks out of the module's attributes"
        ) from error


def signature(module: nn.Module) -> tuple[tuple[torch.Size, torch.dtype, torch.device], ...]:
    """Return shape, type and device of every parameter and buffer of ``module``."""
    tensors = [*module.parameters(), *module.buffers()]
    return tuple((t.shape, t.dtype, t.device) for t in tensors)


def match_modes(module: nn.Module, like: nn.Module) -> None:
    """Give every submodule of ``module`` the training or evaluation mode it has in ``like``."""
    for mine, theirs in zip(module.modules(), like.modules(), strict=True):
        if mine.training != theirs.training:
            mine.training = theirs.training


def clone(tensors: Sequence[Tensor]) -> Tensors:
    """Return detached copies: later in-place changes of ``tensors`` do not reach them."""
    return [t.detach().clone() for t in tensors]


def same_tensors(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether both lists hold the very same tensors."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite ``targets`` by ``sources``."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Return left − right, tensor by tensor."""
    return list(torch._foreach_sub(list(left), list(right))) if left else []


@torch.no_grad()
def interpolate_(start: Sequence[Tensor], end: Sequence[Tensor], fraction: float) -> None:
    """Move ``start`` in place to start + fraction · (end − start), exact at 0 and at 1."""
    if start:
        torch._foreach_lerp_(list(start), list(end), fraction)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all the tensors together, as one scalar."""
    device = tensors[0].device
    norms = [n.to(device) for n in torch._foreach_norm(list(tensors))]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


class RunningMean:
    """A mean over tasks that holds one sum, however many tasks there are.

    Half-precision tensors are summed in float32. A single task passes through unrounded; with
    ``copy=False``, for a mean over a single task, as the very tensors that were added.

    >>> mean = RunningMean()
    >>> mean.add([torch.tensor([1.0])])
    >>> mean.add([torch.tensor([3.0])])
    >>> mean.value()
    [tensor([2.])]
    """

    def __init__(self, copy: bool = True) -> None:
        self.count = 0
        self._copy = copy
        self._sums: Tensors = []
        self._dtypes: list[torch.dtype] = []

    def add(self, tensors: Sequence[Tensor], count: int = 1) -> None:
        """Add the tensors of one task, or the mean over ``count`` tasks."""
        if count == 0:
            return
        if self.count == 0:
            self._dtypes = [t.dtype for t in tensors]
            self._sums = clone(tensors) if self._copy else list(tensors)
            if count > 1:
                self._sums = [t * count for t in self._wide(self._sums)]
        elif tensors:
            if self.count == 1:
                self._sums = self._wide(self._sums)
            torch._foreach_add_(self._sums, self._wide(tensors), alpha=count)
        self.count += count

    def value(self) -> Tensors:
        """Return the mean, in the tensors' own precision."""
        if self.count <= 1 or not self._sums:
            return self._sums
        means = torch._foreach_div(self._sums, float(self.count))
        return [m.to(d) for m, d in zip(means, self._dtypes, strict=True)]

    @staticmethod
    def _wide(tensors: Sequence[Tensor]) -> Tensors:
        return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
