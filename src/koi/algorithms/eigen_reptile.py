"""Eigen-Reptile: φ moves along the main direction of the way that the inner loop took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from koi.algorithms.base import Adaptation, TowardsPoint
from koi.phi.arithmetic import Tensors

# The matrix is squared so often, which is as good as 2¹⁶ steps of the power method.
_SQUARINGS = 16


@dataclass(frozen=True)
class EigenReptile(TowardsPoint):
    """φ ← φ + ε · mean(s_i ζ_i e_i): Reptile, but for what goes astray in the way to φ̃.

    Algorithm 1 of Chen et al., *Robust Meta-learning with Sampling Noise and Label Noise via
    Eigen-Reptile*, arXiv 2206.01944, as the authors' code has it, without self-paced learning. All
    parameters together are one vector. The rows of W are w_0 = φ, …, w_k = φ̃ less their mean. Then

        e is the eigenvector of WᵀW with the largest eigenvalue λ, in the sign in which it points
          from the first half of the way to the second,
        s = λ / Σλ is the share of the scatter that lies along e,
        ζ = Σ_j |(w_{j+1} − w_j) · e| is the length of the way along e.

    WᵀW has a row for each parameter. The Gram matrix A = WWᵀ, with k + 1 rows, has the same λ. With
    A v = λ v and |v| = 1 there are e = Wᵀv / √λ and W e = √λ v, hence

        s ζ e = (λ / tr A) · Σ_j |v_{j+1} − v_j| · Wᵀv.

    One inner step gives φ̃, as Reptile does, and a task that moves nothing gives φ. Of several tasks
    the authors take the means of ζ and of s e apart; here, as in every algorithm, a task gives one
    point.

    >>> steps = [torch.tensor(w) for w in ([0.0, 0.0], [1.0, 0.5], [2.0, 0.0])]
    >>> (given,) = EigenReptile().gives(Adaptation(steps[:1], steps[2:], [[w] for w in steps], []))
    >>> given.round(decimals=4)
    tensor([1.8462, 0.0000])
    """

    trajectory: ClassVar[bool] = True

    def gives(self, task: Adaptation) -> Tensors:
        """Return φ + s ζ e."""
        ways = zip(*task.path, strict=True)
        rows = [_rows(w, start) for w, start in zip(ways, task.start, strict=True)]
        gram = torch.stack([(w @ w.mH).real.to(rows[0].device) for w in rows]).sum(0)
        scatter = (gram * torch.eye(len(gram)).to(gram)).sum()
        vector = _main_eigenvector(gram)
        share = vector @ gram @ vector / _or_one(scatter)
        weights = share * vector.diff().abs().sum() * vector
        return [
            start + (weights.to(w) @ w).view_as(start).to(start.dtype)
            for start, w in zip(task.start, rows, strict=True)
        ]


def _rows(path: tuple[Tensor, ...], start: Tensor) -> Tensor:
    """Return one parameter's columns of W, in at least float32."""
    away = torch.stack(path) - start
    if start.dtype in (torch.bfloat16, torch.float16):
        away = away.float()
    return (away - away.mean(0)).reshape(len(path), start.numel())


def _main_eigenvector(matrix: Tensor) -> Tensor:
    """Return the eigenvector with the largest eigenvalue of a Gram matrix; of zeros, zeros.

    The power method, unlike torch.linalg.eigh, can be mapped and compiled, and hands on what is not
    finite. It begins with the direction from the first half of the rows to the second, and so ends
    with its sign.
    """
    half = len(matrix) // 2
    for _ in range(_SQUARINGS):
        matrix = matrix / _or_one(matrix.amax())
        matrix = matrix @ matrix
    vector = matrix[-half:].sum(0) - matrix[:half].sum(0)
    return vector / _or_one(vector.norm())


def _or_one(size: Tensor) -> Tensor:
    """Return a size to divide by: 1 where it is 0."""
    return torch.where(size == 0, 1, size)
