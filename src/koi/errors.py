"""What can go wrong, each with one sentence that says what was given and how to mend it."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Return a text with escapes in the place of what a terminal would obey, or cannot show.

    Names of files and classes come from elsewhere, and can hold anything.

    >>> print(printable(f"a class {chr(27)}[31mof red"))
    a class \x1b[31mof red
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class KoiError(Exception):
    """Base of every error that Koi raises itself."""

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


class ConfigurationError(KoiError, ValueError):
    """Arguments that cannot work; the message lists every mistake found, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        # the whole message, where another process or a copy makes it anew
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ModelError(KoiError, ValueError):
    """A module that cannot be meta-learned as it stands."""


class TaskError(KoiError, RuntimeError):
    """A task that did not do what a task must."""


class NonFiniteError(TaskError):
    """A loss or an adapted parameter that is NaN or infinite."""


class DataError(KoiError, ValueError):
    """Data that cannot be read, or that are not what they should be."""


class EngineError(KoiError, RuntimeError):
    """Tasks that cannot run the way that was asked for: all at once, or compiled."""


class CheckpointError(KoiError, RuntimeError):
    """A checkpoint that cannot be written or read, or that does not fit."""


class RankError(KoiError, RuntimeError):
    """Another process of a training has stopped, or does not answer."""


class KoiWarning(UserWarning):
    """Something that runs but is probably not what was meant."""

    def __str__(self) -> str:
        return printable(super().__str__())


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """Return a hint such as ``'; did you mean "sgd"?'``, or nothing where nothing is near.

    >>> did_you_mean("sdg", ["sgd", "adam"])
    '; did you mean "sgd"?'
    >>> did_you_mean(3, ["sgd", "adam"])
    ''
    """
    near = difflib.get_close_matches(str(given), list(allowed), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def wrong(name: str, value: object, allowed: str) -> str:
    """Return what is said of an argument that is none of those allowed.

    >>> wrong("num_steps", 0, "a whole number of at least 1")
    'num_steps = 0: must be a whole number of at least 1'
    """
    return f"{name} = {value!r}: must be {allowed}"


def is_end(error: BaseException) -> bool:
    """Return whether ``error`` is a StopIteration, or what a generator makes of one (PEP 479)."""
    passed_on = type(error) is RuntimeError and isinstance(error.__cause__, StopIteration)
    return passed_on or isinstance(error, StopIteration)


def annotate(error: BaseException, note: str) -> None:
    """Tell where ``error`` happened without changing its type, so that users can still catch it.

    Koi's own errors say it in their message; others get a note; either once.
    """
    if f"({note})" in str(error) or note in getattr(error, "__notes__", ()):
        return
    if isinstance(error, KoiError):
        error.args = (f"{error} ({note})",)
    elif hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10 has no notes
        logging.getLogger("koi").error(note)
