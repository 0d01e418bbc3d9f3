"""Which parameters the inner loop moves, and which the meta-update moves."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from koi.errors import ConfigurationError, did_you_mean

# Patterns of names, shell style; or a predicate of name and parameter; None: all.
Names = tuple[str, ...] | Callable[[str, nn.Parameter], bool] | None


def chosen(module: nn.Module, given: Names, argument: str) -> tuple[str, ...]:
    """Return the names of the parameters that ``given`` chooses, in the module's order.

    What is frozen is never chosen. A tied parameter counts once, under its first name, and is
    chosen by any of them.

    Args:
        module: the user's module.
        given: ``"head.*"`` and the like, or a predicate; None chooses all that require a gradient.
        argument: what it is called, for the error.

    Raises:
        ConfigurationError: a pattern matches nothing that can learn, or nothing is chosen.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> chosen(net, ("1.*",), "adapts"), chosen(net, lambda name, p: p.dim() == 1, "adapts")
    (('1.weight', '1.bias'), ('0.bias', '1.bias'))
    """
    able = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if given is None:
        return tuple(able)
    if callable(given):
        names = tuple(name for name, p in able.items() if given(name, p))
        if not names:
            wanted = f"it must return True for some of the {len(able)} parameters that can learn"
            raise ConfigurationError([f"{argument} chooses no parameter: {wanted}"])
        return names
    first = {id(p): name for name, p in able.items()}
    every = dict(module.named_parameters(remove_duplicate=False))
    found: set[str] = set()
    problems = []
    for pattern in given:
        matched = [name for name in every if fnmatchcase(name, pattern)]
        learning = [first[id(every[name])] for name in matched if id(every[name]) in first]
        if matched and not learning:
            problems.append(
                f"{argument} = {pattern!r}: {', '.join(matched[:3])} cannot learn, as its "
                "requires_grad is False: unfreeze it, or leave it out"
            )
        elif not learning:
            problems.append(
                f"{argument} = {pattern!r}: no parameter has such a name"
                f"{did_you_mean(pattern.rstrip('.*'), [*every, *_parts(module)])}"
            )
        found.update(learning)
    if problems:
        raise ConfigurationError(problems)
    return tuple(name for name in able if name in found)


def _parts(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]
