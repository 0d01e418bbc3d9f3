"""Embeddings with a padding row, mapped over tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from koi.inner.checks.granted import is_torchs_own


class EmbeddingPadding(TorchFunctionMode):
    """Lets ``F.embedding(…, padding_idx)`` give its padding row no gradient under vmap either.

    In torch 2.13 the mapped gradient ignores padding_idx (pytorch/pytorch#26302, functorch#240), so
    that the padding row of every text model would move. What is looked up at the padding index is
    taken as a constant instead.

    >>> def loss(weight, ids):
    ...     return F.embedding(ids, weight, padding_idx=0).sum()
    >>> with EmbeddingPadding():
    ...     ids = torch.tensor([[0, 1], [0, 2]])
    ...     torch.func.vmap(torch.func.grad(loss))(torch.zeros(2, 3, 1), ids).flatten(1)
    tensor([[0., 1., 0.],
            [0., 0., 1.]])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace embeddings that have a padding row."""
        kwargs = kwargs or {}
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        return func(*args, **kwargs)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **more: Any
) -> Tensor:
    rows = F.embedding(input, weight, None, *others, **more)
    if padding_idx is None:
        return rows
    index = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
    return torch.where((input == index).unsqueeze(-1), rows.detach(), rows)


def map_padding(module: nn.Module) -> None:
    """Write the embeddings of ``module``, a copy to work on, as `EmbeddingPadding` does.

    For graphs, in which that mode has no place.
    """
    layer: Any
    for layer in module.modules():
        if is_torchs_own(layer, nn.Embedding) and layer.padding_idx is not None:
            layer.forward = partial(_looked_up, layer)


def _looked_up(layer: nn.Embedding, input: Tensor) -> Tensor:
    settings = layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
    return _embedding(input, layer.weight, layer.padding_idx, *settings)
