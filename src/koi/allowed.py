"""What an argument may be: checks that return it as Koi keeps it, or say what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, TypeVar

import torch
from torch import Tensor

from koi.errors import ConfigurationError, did_you_mean, wrong

# Returns a value as Koi keeps it, NumPy's numbers as Python's own, or raises `Refused`.
Check = Callable[[Any], Any]
Made = TypeVar("Made")


# More than anybody counts; and inner steps, each of which is listed before the first is taken.
MOST, MOST_STEPS = 10**12, 10**7
_LARGEST = torch.finfo(torch.float32).max


class Refused(ValueError):  # noqa: N818 (a check's answer, of which an error is made)
    """A check does not take a value; the message says what it takes."""


def check(**given: tuple[Any, Check]) -> None:
    """Check what a function was given: of each argument the value, and what it may be.

    Raises:
        ConfigurationError: naming every argument that is wrong.

    >>> check(num_tasks=(3, count(1)), seed=(0, count(0)))
    """
    problems = []
    for name, (value, may_be) in given.items():
        try:
            may_be(value)
        except Refused as refused:
            problems.append(wrong(name, value, str(refused)))
    if problems:
        raise ConfigurationError(problems)


def of(check: Check, default: Any = MISSING) -> Any:
    """Return a field of a dataclass that `check_fields` checks."""
    return field(default=default, metadata={"check": check})


def check_fields(made: Any) -> None:
    """Check the fields of a dataclass, whose metadata have a "check"; as its ``__post_init__``.

    Each value is then as the check returns it, also in a frozen dataclass.

    Raises:
        ConfigurationError: naming every field that is wrong.
    """
    problems = []
    for each in fields(made):
        value = getattr(made, each.name)
        try:
            object.__setattr__(made, each.name, each.metadata["check"](value))
        except Refused as refused:
            problems.append(wrong(each.name, value, str(refused)))
    if problems:
        raise ConfigurationError(problems)


def made(kind: Callable[..., Made], data: Any, where: str = "") -> Made:
    """Return a dataclass of a dictionary that came from elsewhere, a file for example.

    Args:
        kind: the dataclass, with `check_fields` for its ``__post_init__``.
        data: a value for each of its fields, but for those with a default.
        where: what each mistake begins with.

    Raises:
        ConfigurationError: naming every field that is missing, unknown or wrong.
    """
    if not isinstance(data, Mapping):
        raise ConfigurationError([f"{where}{wrong('it', data, 'a dictionary')}"])
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    problems = [
        f"{where}{name!s} is no field{did_you_mean(name, known)}"
        for name in data
        if name not in known
    ]
    problems += [
        f"{where}{name} is missing"
        for name, each in known.items()
        if name not in data and each.default is MISSING and each.default_factory is MISSING
    ]
    if problems:
        raise ConfigurationError(problems)
    try:
        return kind(**data)
    except ConfigurationError as error:
        raise ConfigurationError(where + problem for problem in error.problems) from None


def number(above: float | None = None) -> Check:
    """Return a check of a finite number of at least 0, or ``above`` one, that float32 can hold."""
    allowed = "of at least 0" if above is None else f"above {above}"

    def check(value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if real and _is_finite(value) and (value >= 0 if above is None else value > above):
            if value <= _LARGEST:
                return float(value)
            raise Refused(f"a number {allowed} that float32 can hold, at most {_LARGEST:.3g}")
        raise Refused(f"a finite number {allowed}")

    return check


def count(least: int, most: int = MOST) -> Check:
    """Return a check of a whole number from ``least`` to ``most``."""

    def check(value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
            if int(value) <= most:
                return int(value)
            raise Refused(f"a whole number from {least} to {most:,}")
        raise Refused(f"a whole number of at least {least}")

    return check


def truth(value: Any) -> Any:
    """Take True or False."""
    if isinstance(value, bool):
        return value
    raise Refused("True or False")


def text(value: Any) -> Any:
    """Take a string that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise Refused("a string")


def name(value: Any) -> Any:
    """Take a name that stands as it is in a path, a command and a card."""
    if isinstance(value, str) and re.fullmatch(r"\w[\w.-]{0,99}", value, re.ASCII):
        return value
    raise Refused("a name of letters, digits, dots and dashes")


def path(value: Any) -> Any:
    """Take the path of a file or a folder."""
    if isinstance(value, str | PathLike):
        name = fspath(value)
        if isinstance(name, str) and name and "\0" not in name:
            return value
    raise Refused("the path of a file or folder, a string or a pathlib.Path")


def device(value: Any) -> Any:
    """Take a device of torch, or its name."""
    if isinstance(value, str | torch.device):
        try:
            torch.device(value)
        except RuntimeError:
            pass
        else:
            return value
    raise Refused('a torch.device, or its name such as "cpu" or "cuda:0"')


def tensor(value: Any) -> Any:
    """Take a tensor."""
    if isinstance(value, Tensor):
        return value
    raise Refused("a torch.Tensor")


def that(holds: Callable[[Any], Any], what: str) -> Check:
    """Return a check of what something holds of, said in words."""

    def check(value: Any) -> Any:
        if holds(value):
            return value
        raise Refused(what)

    return check


def instance(kind: type | tuple[type, ...], what: str) -> Check:
    """Return a check of an object of a class, or one of its subclasses."""
    return that(lambda value: isinstance(value, kind), what)


def each(may_be: Check, what: str) -> Check:
    """Return a check of a sequence that is no text, of whose members another check is made."""

    def check(value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise Refused(f"a list of {what}")
        for part in value:
            try:
                may_be(part)
            except Refused as refused:
                raise Refused(f"a list of {what}, each {refused}") from None
        return value

    return check


def named(may_be: Check) -> Check:
    """Return a check of a dictionary with names, of each of whose values another check is made."""

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise Refused("a dictionary with names")
        for key, part in value.items():
            try:
                may_be(part)
            except Refused as refused:
                raise Refused(f"a dictionary with names, and {key!r} in it {refused}") from None
        return value

    return check


def one_of(options: Iterable[Any], code: str = "") -> Check:
    """Return a check of one of the options or, where ``code`` says of what, of a callable."""
    options = tuple(options)
    words = [option for option in options if isinstance(option, str)]

    def check(value: Any) -> Any:
        if any(value is option for option in options) or (code and callable(value)):
            return value
        if isinstance(value, str) and value in words:
            return value
        allowed = ", ".join(map(repr, options)) + (f" or {code}" if code else "")
        raise Refused(f"one of {allowed}{did_you_mean(value, words)}")

    return check


def optional(check: Check) -> Check:
    """Return a check that lets None through, too."""

    def check_or_none(value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except Refused as refused:
            raise Refused(f"{refused}, or None") from None

    return check_or_none


def schedule(value: Any) -> Any:
    """Take ε: a number, a callable, or None."""
    if value is None or callable(value):
        return value
    try:
        return number()(value)
    except Refused as refused:
        raise Refused(
            f"{refused}, a callable of the fraction done such as koi.linear(1.0, 0.0), or None"
        ) from None


def step_size(value: Any) -> Any:
    """Take inner rates: a number, a schedule, or a dictionary of these by name."""
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
        return {name: rate(each) for name, each in value.items()}
    try:
        return rate(value)
    except Refused as refused:
        raise Refused(
            f"{refused}, a schedule such as koi.linear(0.1, 0.01), or a dictionary such as "
            '{"head.*": 0.1, "*": 0.01}'
        ) from None


def rate(value: Any) -> Any:
    """Take a number above 0, or a schedule."""
    return value if callable(value) else number(above=0)(value)


def code_of_fraction(value: Any) -> Any:
    """Take a schedule of the inner steps."""
    if callable(value):
        return value
    raise Refused("a schedule of the fraction of the inner steps, such as koi.linear(1.0, 0.1)")


def fraction(value: Any) -> Any:
    """Take a number from 0 to below 1."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if real and 0 <= value < 1:
        return float(value)
    raise Refused("a number of at least 0 and below 1")


def code(signature: str) -> Check:
    """Return a check of a callable."""

    def check(value: Any) -> Any:
        if callable(value):
            return value
        raise Refused(f"a callable {signature}")

    return check


def names(value: Any) -> Any:
    """Take patterns of names as a tuple, a predicate, or None."""
    patterns = (value,) if isinstance(value, str) else value
    if value is None or callable(value):
        return value
    listed = isinstance(patterns, list | tuple) and len(patterns) > 0
    if listed and all(isinstance(pattern, str) for pattern in patterns):
        return tuple(patterns)
    raise Refused('a name pattern such as "head.*", a list of them, a predicate, or None')


def mode(value: Any) -> Any:
    """Take a bool or a word."""
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    if isinstance(value, bool) or (isinstance(value, str) and value in modes):
        return value
    near = did_you_mean(value, modes)
    raise Refused(f"True, False or a mode of torch.compile: {', '.join(map(repr, modes))}{near}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False
