"""Layers of other libraries, mapped over tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


@contextmanager
def values_unread() -> Iterator[None]:
    """Let models of transformers and peft not read the values of tensors, where they need not.

    `transformers` looks whether anything is masked and leaves an attention mask away that masks
    nothing: an ``if``, on which tasks part. Here it always makes the mask, as it does in models
    that are exported. `peft` has LoHa's product in a ``torch.autograd.Function`` that cannot be
    mapped; here it is what that computes. What a library does otherwise one day is then refused
    again in the sentence that names its line.
    """
    with _masks_written_out(), _hadamard_products():
        yield


@contextmanager
def _masks_written_out() -> Iterator[None]:
    masking = sys.modules.get("transformers.masking_utils")  # no model of it without
    makers = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", {})
    before = {name: makers[name] for name in ("sdpa", "eager") if name in makers}
    for name, make in before.items():
        makers[name] = partial(_whole_mask, make)  # over a registered one, for as long as it is set
    try:
        yield
    finally:
        for name, make in before.items():
            del makers[name]
            if makers.get(name) is not make:
                makers[name] = make


def _whole_mask(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(*args, **{**kwargs, **never})


@contextmanager
def _hadamard_products() -> Iterator[None]:
    loha = sys.modules.get("peft.tuners.loha.layer")
    products = {"make_weight": _hadamard, "make_weight_cp": _hadamard_cp}
    before = {name: getattr(loha, name) for name in products if hasattr(loha, name)}
    for name in before:
        setattr(loha, name, products[name])
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(loha, name, make)


def _hadamard(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor) -> Tensor:
    """Return (W₁ₐW₁ᵦ) ⊙ (W₂ₐW₂ᵦ), FedPara's equation 1 (Hyeon-Woo et al., arXiv 2108.06098)."""
    return (w1a @ w1b) * (w2a @ w2b) * scale


def _hadamard_cp(
    t1: Tensor, w1a: Tensor, w1b: Tensor, t2: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor
) -> Tensor:
    """Return the same of convolutions, whose factors have a core tensor (its proposition 3)."""
    rebuild = partial(torch.einsum, "ijkl,jr,ip->prkl")
    return rebuild(t1, w1b, w1a) * rebuild(t2, w2b, w2a) * scale
