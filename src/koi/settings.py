"""Every argument of `koi.Koi` but the model: its default, its meaning and its check, in one place.

The constructor, its help, ``repr(koi)``, what a checkpoint holds, the engines' keys and the error
with all mistakes at once are made of the fields of `Settings`. A new setting is a new field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from koi.algorithms import NAMED, Algorithm, schedule_of
from koi.errors import ConfigurationError, did_you_mean, wrong
from koi.inner.optimizers.rules import FACTORIES, OptimizerFactory, make_optimizer
from koi.phi.learned import Learned
from koi.phi.roles import Names
from koi.phi.schedules import KNOWN, Schedule
from koi.phi.update import MetaOptimizerFactory

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


def _schedule(value: Any) -> Any:
    if value is None or callable(value):
        return value
    try:
        return number()(value)
    except Refused as refused:
        raise Refused(
            f"{refused}, a callable of the fraction done such as koi.linear(1.0, 0.0), or None"
        ) from None


def _fraction(value: Any) -> Any:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if real and 0 <= value < 1:
        return float(value)
    raise Refused("a number of at least 0 and below 1")


def _code(value: Any) -> Any:
    if callable(value):
        return value
    raise Refused("a callable (params)")


def _names(value: Any) -> Any:
    patterns = (value,) if isinstance(value, str) else value
    if value is None or callable(value):
        return value
    listed = isinstance(patterns, list | tuple) and len(patterns) > 0
    if listed and all(isinstance(pattern, str) for pattern in patterns):
        return tuple(patterns)
    raise Refused('a name pattern such as "head.*", a list of them, a predicate, or None')


def _mode(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    raise Refused("True, False or a mode of torch.compile")


def _algorithm(value: Any) -> Any:
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


def setting(
    default: Any, check: Check, doc: str, *, engines: bool = False, stored: bool = True
) -> Any:
    """Return a field of `Settings`.

    Args:
        default: its value where none is given.
        check: returns a value as Koi keeps it, or raises `Refused` with what is allowed.
        doc: what it does.
        engines: whether engines are made of it, and so made anew where it changes.
        stored: whether φ depends on it, so that a checkpoint holds it.
    """
    about = {"check": check, "doc": doc, "engines": engines, "stored": stored}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """How a learner learns: all that `koi.Koi` is given besides the model, checked.

    Raises:
        ConfigurationError: listing every setting that is wrong, with what is allowed.

    >>> settings = Settings(step_size=0.1, seed=3)
    >>> settings.num_steps, settings.changed()
    (10, {'step_size': 0.1, 'seed': 3})
    """

    step_size: float = setting(
        *(0.01, number(above=0), "learning rate of the inner optimizer."), engines=True
    )
    num_steps: int = setting(10, count(1), "inner steps on each task.")
    num_iterations: int = setting(1000, count(0), "meta-iterations.")
    _: KW_ONLY
    meta_step_size: float | Schedule | None = setting(
        None,
        _schedule,
        "ε, a number or a schedule of the fraction done in [0, 1] (``koi.linear``, ``koi.cosine``, "
        "``koi.warmup``, any callable); None: ``koi.linear(1.0, 0.0)`` where an algorithm moves φ "
        "towards a point, step_size where against a gradient. It scales the rate of a "
        "meta_optimizer, for which None is 1.",
    )
    meta_batch_size: int = setting(1, count(1), "tasks in each meta-iteration.")
    inner_optimizer: str | OptimizerFactory = setting(
        "sgd",
        one_of(FACTORIES, code="a callable (params, lr)"),
        '"sgd", "adam" (both as torch.optim\'s defaults have them), or a callable (params, lr) '
        "that returns a ``torch.optim.Optimizer``.",
        engines=True,
    )
    inner_state: str = setting(
        "carry",
        one_of(("carry", "reset")),
        'whether momentum and adaptive moments live on from task to task ("carry", as in the '
        'paper\'s code; over a meta-batch they are averaged) or start afresh ("reset").',
    )
    meta_optimizer: MetaOptimizerFactory | None = setting(
        None,
        optional(_code),
        "None, or a callable (params) that returns a ``torch.optim.Optimizer``; it is fed the "
        "meta-gradient, φ − mean(φ̃) or the mean gradient, and steps by its own rate times ε. "
        "Buffers follow ε, at most 1.",
    )
    clip_meta: float | None = setting(
        None,
        optional(number(above=0)),
        "the largest Euclidean norm of the meta-gradient; a longer one is scaled down to it.",
    )
    average: float | None = setting(
        None,
        optional(_fraction),
        "None, or the decay β of an exponential mean of φ, such as 0.999, that "
        "`Koi.averaged` gives.",
    )
    algorithm: str | Algorithm = setting(
        "reptile",
        _algorithm,
        '"reptile"; "eigen-reptile", which moves φ along the main direction of the way to φ̃; '
        '"fomaml" and "maml", which move φ against the gradient of the query loss at φ̃, taken with '
        "respect to φ̃ or, through all inner steps, to φ; or a `koi.algorithms.Algorithm`.",
        engines=True,
    )
    vectorize: str | bool = setting(
        "auto",
        one_of(("auto", True, False)),
        "True: all tasks of a meta-batch at once, or an `EngineError`; False: one by one; "
        '"auto": at once where it can be and, by the sizes, is not slower.',
        engines=True,
    )
    compile: bool | str = setting(
        False,
        _mode,
        "True, or a mode of `torch.compile`: the inner loop becomes one graph.",
        engines=True,
    )
    seed: int | None = setting(
        None,
        optional(count(0)),
        "makes runs repeatable, bit for bit on one machine, and independent of the global random "
        "state. None: tasks draw from the global generators as they are.",
    )
    adapts: Names = setting(
        None,
        _names,
        'which parameters the inner loop moves: a name pattern such as ``"head.*"``, or a list of '
        "them; or a predicate (name, parameter); None: all that require a gradient.",
        engines=True,
    )
    learns: Names = setting(
        None,
        _names,
        "which parameters the meta-update moves, likewise. What is learned and not adapted needs "
        "an outer gradient (FOMAML, MAML); what is adapted and not learned starts every task as it "
        "is.",
        engines=True,
    )
    on_nonfinite: str = setting(
        "raise",
        one_of(("raise", "skip")),
        'what a NaN or infinite loss does: "raise" an error, or "skip" the task.',
        engines=True,
    )
    chunk_size: int | None = setting(
        None, optional(count(1)), "at most so many tasks at once; None: all.", engines=True
    )
    autocast: torch.dtype | None = setting(
        None,
        one_of((None, torch.bfloat16, torch.float16)),
        "`torch.bfloat16` or `torch.float16`: losses are computed in it, weights stay as they are.",
        engines=True,
    )
    check: bool = setting(
        True,
        one_of((True, False)),
        "whether Koi compares the engine that it chose with a plain loop on the first one or two "
        "tasks, and again when what the engine takes for granted has changed.",
        engines=True,
        stored=False,
    )

    def __post_init__(self) -> None:
        problems = []
        for each in fields(self):
            value = getattr(self, each.name)
            try:
                object.__setattr__(self, each.name, each.metadata["check"](value))
            except Refused as refused:
                problems.append(wrong(each.name, value, str(refused)))
        if problems:
            raise ConfigurationError(problems)

    def changed(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults."""
        values = ((each, getattr(self, each.name)) for each in fields(self))
        return {each.name: value for each, value in values if value != each.default}

    def of_engines(self) -> list[Any]:
        """Return the values of those settings of which engines are made."""
        return [getattr(self, each.name) for each in fields(self) if each.metadata["engines"]]

    def stored(self) -> dict[str, Any]:
        """Return the settings that φ depends on, as a file can hold them."""
        names = [each.name for each in fields(self) if each.metadata["stored"]]
        return {name: as_data(getattr(self, name)) for name in names}

    def learned(self, model: nn.Module) -> Learned:
        """Return the names of what moves in a model, by ``adapts`` and ``learns``.

        Raises:
            ConfigurationError, ModelError: as `koi.phi.learned.Learned.of`.
        """
        return Learned.of(model, self.adapts, self.learns)

    def steps(self, num_steps: int | None) -> int:
        """Return the inner steps that a method was given, checked; None: those of training."""
        if num_steps is None:
            return self.num_steps
        check_count("num_steps", num_steps, least=0)
        return num_steps

    @property
    def schedule(self) -> float | Schedule:
        """ε as it was given, or what is right for the algorithm and the meta-optimizer."""
        if self.meta_step_size is None and self.meta_optimizer is not None:
            return 1.0
        return schedule_of(self.meta_step_size, self.algorithm, self.step_size)

    @property
    def optimizer_factory(self) -> OptimizerFactory:
        """The callable that makes the inner optimizer."""
        given = self.inner_optimizer
        return FACTORIES[given] if isinstance(given, str) else given

    def optimizer(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the inner optimizer of these parameters."""
        return make_optimizer(self.optimizer_factory, params, self.step_size)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check one whole number that a method was given.

    Raises:
        ConfigurationError: it is none of at least ``least``.
    """
    try:
        count(least)(value)
    except Refused as refused:
        raise ConfigurationError([wrong(name, value, str(refused))]) from None


def as_data(value: Any) -> Any:
    """Return a setting as a file can hold it; of code, its name for messages.

    >>> from koi import linear
    >>> as_data(linear(1.0, 0.0)), as_data(torch.optim.SGD)
    (('linear', 1.0, 0.0), ('code', 'SGD'))
    """
    if isinstance(value, tuple(KNOWN.values())) and is_dataclass(value):
        parts = [getattr(value, each.name) for each in fields(value)]
        data = [as_data(part) if callable(part) else float(part) for part in parts]
        if not any(map(is_code, data)):
            return type(value).__name__, *data
    if isinstance(value, tuple):
        return list(value)
    if callable(value) or isinstance(value, Algorithm):
        return "code", getattr(value, "__qualname__", type(value).__qualname__)
    return value


def from_data(value: Any) -> Any:
    """Return the setting that `as_data` was given; code stays a name."""
    if isinstance(value, tuple) and value[0] in KNOWN:
        return KNOWN[value[0]](*map(from_data, value[1:]))
    return tuple(value) if isinstance(value, list) else value


def is_code(value: Any) -> bool:
    """Return whether a stored setting is the name of code."""
    return isinstance(value, tuple) and value[0] == "code"


def shown(value: Any) -> str:
    """Return a stored setting for a message.

    >>> from koi import linear
    >>> shown(as_data(linear(1.0, 0.0))), shown(as_data(torch.optim.SGD))
    ('linear(start=1.0, end=0.0)', 'code (SGD)')
    """
    return f"code ({value[1]})" if is_code(value) else repr(from_data(value))
