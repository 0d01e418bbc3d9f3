"""Arithmetic on lists of tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]


def clone(tensors: Sequence[Tensor]) -> Tensors:
    """Return detached copies: later in-place changes of ``tensors`` do not reach them."""
    return [t.detach().clone() for t in tensors]


def same_tensors(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether both lists hold the very same tensors."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def same_shapes(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether tensors of the one list have the shapes of those of the other."""
    return [t.shape for t in left] == [t.shape for t in right]


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite ``targets`` by ``sources``."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(list(targets), list(sources))


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Return left − right, tensor by tensor."""
    return list(torch._foreach_sub(list(left), list(right))) if left else []


@torch.no_grad()
def unchanged(left: Tensor, right: Tensor) -> Tensor:
    """Return where two tensors hold the same values, infinities and NaN included."""
    return (left == right) | (left.isnan() & right.isnan())


@torch.no_grad()
def movements(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensors:
    """Return end − start, exactly zero where they are the same, be they infinite."""
    return [
        torch.where(unchanged(end, start), torch.zeros_like(start), end - start)
        for end, start in zip(ends, starts, strict=True)
    ]


def move_(tensors: Sequence[Tensor], changes: Sequence[Tensor], fraction: float) -> None:
    """Move ``tensors`` in place by fraction · change; what has no change stays bit for bit."""
    for tensor, change in zip(tensors, changes, strict=True):
        with torch.no_grad():
            tensor.copy_(torch.where(change == 0, tensor, tensor + fraction * change))


def interpolate_(start: Sequence[Tensor], end: Sequence[Tensor], fraction: float) -> None:
    """Move ``start`` in place to start + fraction · (end − start), exact at 0 and at 1."""
    if start:
        torch._foreach_lerp_(list(start), list(end), fraction)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, as one vector."""
    each = torch._foreach_norm(list(tensors))
    if len({norm.device for norm in each}) > 1:
        each = tuple(norm.to(each[0].device) for norm in each)
    return torch.stack(each)


def norm(tensors: Sequence[Tensor], *, stacked: bool = False) -> Tensor:
    """Return the Euclidean norm over all the tensors together, as one scalar; if stacked, by rows.

    >>> norm([torch.tensor([3.0, 0.3]), torch.tensor([[4.0], [0.4]])], stacked=True)
    tensor([5.0000, 0.5000])
    """
    if not stacked:
        total: Tensor = torch.linalg.vector_norm(norms(tensors))
        return total
    rows = [t.unsqueeze(-1).flatten(1) for t in tensors]  # a row may be without a dimension
    each = torch.stack([torch.linalg.vector_norm(row, dim=-1) for row in rows])
    of_rows: Tensor = torch.linalg.vector_norm(each, dim=0)
    return of_rows


def squared_norm(tensors: Sequence[Tensor], *, stacked: bool) -> Tensor:
    """Return Σ |x|² over all numbers of the tensors, as one scalar; if stacked, of each row.

    It has derivatives of any order at zero, where `norm` has none.

    >>> squared_norm([torch.tensor([3.0, 0.3]), torch.tensor([[4.0], [0.4]])], stacked=True)
    tensor([25.0000,  0.2500])
    """
    squares = [t.abs().square() if t.is_complex() else t.square() for t in tensors]
    first = 1 if stacked else 0  # a row may be one number, without a dimension
    return torch.stack([s.unsqueeze(-1).flatten(first).sum(-1) for s in squares]).sum(0)


def in_words(tensor: Tensor) -> str:
    """Return a tensor's shape and type, for messages.

    >>> in_words(torch.zeros(2, 3))
    'shape (2, 3), float32'
    """
    return f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value, 0 of an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def weights_like(weights: Sequence[float], params: Sequence[Tensor]) -> Tensor:
    """Return weights as a tensor beside parameters, in at least float32."""
    dtype = torch.promote_types(params[0].dtype.to_real(), torch.float32)
    return torch.tensor(weights, dtype=dtype, device=params[0].device)


def mean_of(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ w_i t_i / Σ w_i over the first dimension; None: all weights are the same.

    >>> mean_of(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
    tensor(2.)
    """
    if weights is None:
        # in the order in which they lie in memory, which torch reads six times as fast
        order = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)
        back = sorted(range(len(order)), key=order.__getitem__)
        return rows.permute(0, *order).mean(0).permute(back)
    (wide,) = _wide([rows])
    shares = (weights / weights.sum()).reshape(-1, *[1] * (rows.dim() - 1))
    return (wide * shares).sum(0).to(rows.dtype)


class RunningMean:
    """A mean over tasks that holds one sum, however many tasks there are.

    A task may count more than another, by any weight. Half-precision tensors are summed in float32.
    What is added only once passes through as it is; with ``copy=False``, for a mean of which that
    is known, as the very tensors.

    >>> mean = RunningMean()
    >>> mean.add([torch.tensor([1.0])])
    >>> mean.add([torch.tensor([4.0])], count=2)
    >>> mean.value()
    [tensor([3.])]
    """

    def __init__(self, copy: bool = True) -> None:
        self.count = 0.0
        self._copy = copy
        self._first: tuple[Tensors, float] | None = None
        self._sums: Tensors = []

    def add(self, tensors: Sequence[Tensor], count: float = 1) -> None:
        """Add the tensors of one task, or the mean over ``count`` tasks; of none, nothing."""
        if count == 0:
            return
        if self._first is None:
            self._first = clone(tensors) if self._copy else list(tensors), count
        elif tensors:
            if not self._sums:
                self._sums = [t * self._first[1] for t in _wide(self._first[0])]
            torch._foreach_add_(self._sums, _wide(tensors), alpha=count)
        self.count += count

    def value(self) -> Tensors:
        """Return the mean, in the tensors' own precision."""
        if self._first is None:
            return []
        first, _ = self._first
        if not self._sums:
            return first
        means = torch._foreach_div(self._sums, self.count)
        return [mean.to(own.dtype) for mean, own in zip(means, first, strict=True)]


def _wide(tensors: Sequence[Tensor]) -> Tensors:
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
