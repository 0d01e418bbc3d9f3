"""Which of torch's optimizers a pure rule may stand for.

A rule has the arithmetic of ``torch.optim``'s own step and nothing else: whatever a user can add to
that must be seen here, and the optimizer then steps as itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from koi.inner.optimizers.hooks import step_hooks
from koi.inner.optimizers.rules import SGD, Adam, UpdateRule, layout_of


def update_rule(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], differentiable: bool = False
) -> UpdateRule | None:
    """Return the pure rule that does what ``optimizer`` does, or None where there is none.

    Args:
        optimizer: as the factory made it, before any step.
        params: what the factory was called with; the rule steps those that the optimizer was given.
        differentiable: whether MAML differentiates through the rule.
    """
    if why_no_rule(optimizer) is not None:
        return None
    kind, group = type(optimizer), optimizer.param_groups[0]
    places = frozenset(layout_of(optimizer, params)[0].places)
    only = None if len(places) == len(params) else places
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(lr, float(group["momentum"]), bool(group["nesterov"]), decay, only)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    # in torch 2.6 AdamW is a class of its own, without this entry
    decoupled = bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW))
    return Adam(lr, beta1, beta2, float(group["eps"]), decay, decoupled, differentiable, only)


def why_no_rule(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what is out of the ordinary in an optimizer, so that no rule may stand for it."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return f"it is {kind.__name__}"
    if "step" in vars(optimizer) or not _is_torchs_own(kind.step):
        return "its step is wrapped or replaced"
    if any(step_hooks(optimizer)):
        return "it has step hooks"
    if len(groups) > 1:
        return f"it has {len(groups)} parameter groups"
    if len(set(groups[0]["params"])) < len(groups[0]["params"]):
        return "it was given a parameter twice"
    if optimizer.state:
        return "it has a state before its first step"
    attributes, entries = _by_default(kind)
    added = (vars(optimizer).keys() - attributes) | (groups[0].keys() ^ entries)
    if added:
        return (
            f"{', '.join(sorted(added))} is set or missing, unlike in {kind.__name__} as it comes"
        )
    for name, value in groups[0].items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Tensor) for part in values):
            return f"its {name} is a tensor"
        if name in ("maximize", "amsgrad", "capturable", "dampening") and value:
            return f"it has {name}={value}"
    if kind is not torch.optim.SGD and any(p.is_complex() for p in groups[0]["params"]):
        return "Adam takes complex parameters for pairs of real ones"
    return None


def _is_torchs_own(step: Any) -> bool:
    """Return whether a method, and all that it wraps, is defined in ``torch.optim``."""
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim."):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


@cache
def _by_default(kind: type[torch.optim.Optimizer]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of an optimizer's attributes, and those of a parameter group's entries."""
    plain = kind([torch.zeros(1)])  # type: ignore[call-arg]  # torch's own have defaults
    with_fused = {"_step_supports_amp_scaling", "_need_device_dtype_check_for_fused"}
    return frozenset(vars(plain)) | with_fused, frozenset(plain.param_groups[0])
