"""What tasks and callbacks remember of their own, kept in checkpoints and given back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from koi.errors import CheckpointError, ConfigurationError


def holders(callbacks: Iterable[Any]) -> tuple[Any, ...]:
    """Return what has a state, in order: a callback, or the object that it is a method of.

    Raises:
        ConfigurationError: one has ``state_dict`` and cannot be given what that returns.

    >>> class Count:
    ...     def __call__(self, koi, record): ...
    ...     def state_dict(self): ...
    ...     def load_state_dict(self, state): ...
    >>> count = Count()
    >>> holders([print, count]) == holders([count.__call__]) == (count,)
    True
    """
    owners = (owner for callback in callbacks if (owner := owner_of(callback)) is not None)
    found = tuple(owners)
    for owner in found:
        if not hasattr(owner, "load_state_dict"):
            raise ConfigurationError(
                [
                    f"the callback {type(owner).__name__} has state_dict and no load_state_dict, "
                    "so its state would be lost where a training goes on: give it both or neither"
                ]
            )
    return found


def owner_of(callback: Any) -> Any:
    """Return the callback, or the object that it is a method of, if that has a state."""
    for owner in (callback, getattr(callback, "__self__", None)):
        if hasattr(owner, "state_dict") and not isinstance(owner, type):
            return owner
    return None


def give_state(tasks: Any, state: Any) -> None:
    """Give a task distribution the state that was stored.

    Raises:
        CheckpointError: there is one and the distribution cannot take it.
    """
    if state is None:
        return
    if not hasattr(tasks, "load_state_dict"):
        raise CheckpointError(
            f"the checkpoint holds the state of a task distribution, and {type(tasks).__name__} "
            "has no load_state_dict: give the distribution that was trained on"
        )
    tasks.load_state_dict(copy.deepcopy(state))


def give_states(owners: Sequence[Any], states: Sequence[Any] | None) -> None:
    """Give callbacks the states that were stored, in order; None: there were none to store.

    Raises:
        CheckpointError: there are more of the one than of the other.
    """
    if states is None:
        return
    if len(states) != len(owners):
        raise CheckpointError(
            f"the checkpoint holds the states of {len(states)} callbacks, and of the callbacks "
            f"given {len(owners)} have state_dict: give those that it was made with, in that order"
        )
    for owner, state in zip(owners, states, strict=True):
        owner.load_state_dict(copy.deepcopy(state))
