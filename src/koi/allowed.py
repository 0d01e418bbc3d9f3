"""What an argument may be: checks that return it as Koi keeps it, or say what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from koi.algorithms import NAMED, Algorithm
from koi.errors import did_you_mean

# Returns a value as Koi keeps it, NumPy's numbers as Python's own, or raises `Refused`.
Check = Callable[[Any], Any]


class Refused(ValueError):  # noqa: N818 (a check's answer, of which an error is made)
    """A check does not take a value; the message says what it takes."""


def number(above: float | None = None) -> Check:
    """Return a check of a finite number of at least 0, or ``above`` one."""
    allowed = "of at least 0" if above is None else f"above {above}"

    def check(value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if real and _is_finite(value) and (value >= 0 if above is None else value > above):
            return float(value)
        raise Refused(f"a finite number {allowed}")

    return check


def count(least: int) -> Check:
    """Return a check of a whole number of at least ``least``."""

    def check(value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
            return int(value)
        raise Refused(f"a whole number of at least {least}")

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


def code(value: Any) -> Any:
    """Take a callable of parameters."""
    if callable(value):
        return value
    raise Refused("a callable (params)")


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
    if isinstance(value, bool | str):
        return value
    raise Refused("True, False or a mode of torch.compile")


def algorithm(value: Any) -> Any:
    """Take an algorithm or its name."""
    if isinstance(value, str) and value in NAMED:
        return value
    if not isinstance(value, Algorithm):
        options = ", ".join(map(repr, NAMED))
        near = did_you_mean(value, NAMED)
        raise Refused(f"one of {options}, or an object such as koi.algorithms.Reptile(){near}")
    kind = type(value).__name__
    if "__dataclass_params__" not in vars(type(value)):
        raise Refused(f"data: put @dataclass(frozen=True) above the class {kind}")
    if value.second_order and not value.query_gradient:
        raise Refused(f"consistent: {kind}.second_order is True, so make query_gradient True, too")
    return value


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False
