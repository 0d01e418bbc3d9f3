"""What `koi.Koi.train` was given, checked before anything begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from koi import allowed
from koi.errors import ConfigurationError, wrong


def checked_callbacks(callbacks: Any) -> tuple[Callable[..., Any], ...]:
    """Return callbacks as a tuple: None is none of them, a callable one.

    Raises:
        ConfigurationError: one cannot be called.

    >>> checked_callbacks(None), checked_callbacks(print)
    ((), (<built-in function print>,))
    """
    if callbacks is None:
        return ()
    given = (callbacks,) if callable(callbacks) else callbacks
    try:
        found = tuple(given)
    except TypeError:
        found = (given,)
    problems = [
        wrong("callbacks", each, "callables (koi, record), one or a list of them")
        for each in found
        if not callable(each)
    ]
    if problems:
        raise ConfigurationError(problems)
    return found


def check_options(progress: Any, checkpoint_dir: Any, resume: Any, log_dir: Any) -> None:
    """Check the arguments that are no numbers.

    Raises:
        ConfigurationError: naming each that is wrong.
    """
    allowed.check(
        progress=(progress, allowed.optional(allowed.truth)),
        checkpoint_dir=(checkpoint_dir, allowed.optional(allowed.path)),
        resume=(resume, allowed.truth),
        log_dir=(log_dir, allowed.optional(allowed.path)),
    )
