"""Every argument of `koi.Koi` but the model: its default, its meaning and its check, in one place.

The constructor, its help, ``repr(koi)``, what a checkpoint holds, the engines' keys and the error
with all mistakes at once are made of the fields of `Settings`. A new setting is a new field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from koi import allowed
from koi.algorithms import Algorithm, checked, schedule_of
from koi.errors import ConfigurationError
from koi.inner.optimizers.rules import FACTORIES, OptimizerFactory, make_optimizer
from koi.phi.learned import Learned
from koi.phi.rates import LearnedRates, StepSize, rates
from koi.phi.roles import Names
from koi.phi.schedules import KNOWN, Schedule
from koi.phi.update import MetaOptimizerFactory


def setting(
    default: Any, check: allowed.Check, doc: str, *, engines: bool = False, stored: bool = True
) -> Any:
    """Return a field of `Settings`.

    Args:
        default: its value where none is given.
        check: returns a value as Koi keeps it, or raises `koi.allowed.Refused`.
        doc: what it does.
        engines: whether engines are made of it, and so made anew where it changes.
        stored: whether φ depends on it, so that a checkpoint holds it.
    """
    about = {"check": check, "doc": doc, "engines": engines, "stored": stored}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """How a learner learns: all that `koi.Koi` is given besides the model, checked.

    In this order: how long and how fast; the inner loop; the meta-update; what adapts, and what
    learns; how it runs.

    Raises:
        ConfigurationError: listing every setting that is wrong, with what is allowed.

    >>> settings = Settings(step_size=0.1, seed=3)
    >>> settings.num_steps, settings.changed()
    (10, {'step_size': 0.1, 'seed': 3})
    """

    step_size: StepSize = setting(
        0.01,
        allowed.step_size,
        "learning rate of the inner optimizer: a number; a schedule of the fraction of the "
        'training that is done; or a dictionary of name patterns, ``{"head.*": 0.1, "*": 0.01}``, '
        "of which the first that fits counts.",
        engines=True,
    )
    num_steps: int = setting(10, allowed.count(1, allowed.MOST_STEPS), "inner steps on each task.")
    num_iterations: int = setting(1000, allowed.count(0), "meta-iterations.")
    _: KW_ONLY

    # the inner loop
    inner_optimizer: str | OptimizerFactory = setting(
        "sgd",
        allowed.one_of(FACTORIES, code="a callable (params, lr)"),
        '"sgd", "adam", "adamw" (each as torch.optim\'s defaults have it), or a callable '
        "(params, lr) that returns a ``torch.optim.Optimizer``.",
        engines=True,
    )
    inner_state: str = setting(
        "carry",
        allowed.one_of(("carry", "reset")),
        'whether momentum and adaptive moments live on from task to task ("carry", as in the '
        'paper\'s code; over a meta-batch they are averaged) or start afresh ("reset").',
    )
    inner_schedule: Schedule | None = setting(
        None,
        allowed.optional(allowed.code_of_fraction),
        "a schedule of the fraction of the inner steps that are done, j / num_steps at step j; it "
        "multiplies step_size.",
        engines=True,
    )
    clip_inner: float | None = setting(
        None,
        allowed.optional(allowed.number(above=0)),
        "the largest Euclidean norm of each task's inner gradient; a longer one is scaled down.",
        engines=True,
    )
    learn_step_size: str | None = setting(
        None,
        allowed.one_of((None, "parameter", "layer")),
        "inner rates that are a part of φ, learned by FOMAML and MAML from step_size on: "
        '"parameter", one for each number in each parameter (Meta-SGD); "layer", one for each '
        "parameter and inner step (MAML++).",
        engines=True,
    )

    # the meta-update
    algorithm: str | Algorithm = setting(
        "reptile",
        checked,
        '"reptile"; "eigen-reptile", which moves φ along the main direction of the way to φ̃; '
        '"fomaml" and "maml", which move φ against the gradient of the query loss at φ̃, taken with '
        "respect to φ̃ or, through all inner steps, to φ; or a `koi.algorithms.Algorithm`.",
        engines=True,
    )
    meta_batch_size: int = setting(1, allowed.count(1), "tasks in each meta-iteration.")
    meta_step_size: float | Schedule | None = setting(
        None,
        allowed.schedule,
        "ε, a number or a schedule of the fraction done in [0, 1] (``koi.linear``, ``koi.cosine``, "
        "``koi.warmup``, any callable); None: ``koi.linear(1.0, 0.0)`` where an algorithm moves φ "
        "towards a point, step_size where against a gradient. It scales the rate of a "
        "meta_optimizer, for which None is 1.",
    )
    meta_optimizer: MetaOptimizerFactory | None = setting(
        None,
        allowed.optional(allowed.code("(params)")),
        "None, or a callable (params) that returns a ``torch.optim.Optimizer``; it is fed the "
        "meta-gradient, φ − mean(φ̃) or the mean gradient, and steps by its own rate times ε. "
        "Buffers follow ε, at most 1.",
    )
    clip_meta: float | None = setting(
        None,
        allowed.optional(allowed.number(above=0)),
        "the largest Euclidean norm of the meta-gradient; a longer one is scaled down to it.",
    )
    average: float | None = setting(
        None,
        allowed.optional(allowed.fraction),
        "None, or the decay β of an exponential mean of φ, such as 0.999, that "
        "`Koi.averaged` gives.",
    )

    # what adapts, and what learns
    adapts: Names = setting(
        None,
        allowed.names,
        'which parameters the inner loop moves: a name pattern such as ``"head.*"``, or a list of '
        "them; or a predicate (name, parameter); None: all that require a gradient.",
        engines=True,
    )
    learns: Names = setting(
        None,
        allowed.names,
        "which parameters the meta-update moves, likewise. What is learned and not adapted needs "
        "an outer gradient (FOMAML, MAML); what is adapted and not learned starts every task as it "
        "is.",
        engines=True,
    )

    # how it runs
    vectorize: str | bool = setting(
        "auto",
        allowed.one_of(("auto", True, False)),
        "True: all tasks of a meta-batch at once, or an `EngineError`; False: one by one; "
        '"auto": at once where it can be and, by the sizes, is not slower.',
        engines=True,
    )
    compile: bool | str = setting(
        False,
        allowed.mode,
        "True, or a mode of `torch.compile`: the inner loop becomes one graph.",
        engines=True,
    )
    chunk_size: int | None = setting(
        None,
        allowed.optional(allowed.count(1)),
        "at most so many tasks at once; None: all.",
        engines=True,
    )
    autocast: torch.dtype | None = setting(
        None,
        allowed.one_of((None, torch.bfloat16, torch.float16)),
        "`torch.bfloat16` or `torch.float16`: losses are computed in it, weights stay as they are.",
        engines=True,
    )
    seed: int | None = setting(
        None,
        allowed.optional(allowed.count(0, most=2**64)),
        "makes runs repeatable, bit for bit on one machine, and independent of the global random "
        "state. None: tasks draw from the global generators as they are.",
    )
    on_nonfinite: str = setting(
        "raise",
        allowed.one_of(("raise", "skip")),
        'what a NaN or infinite loss does: "raise" an error, or "skip" the task.',
        engines=True,
    )
    check: bool = setting(
        True,
        allowed.one_of((True, False)),
        "whether Koi compares the engine that it chose with a plain loop on the first one or two "
        "tasks, and again when what the engine takes for granted has changed.",
        engines=True,
        stored=False,
    )

    def __post_init__(self) -> None:
        allowed.check_fields(self)

    def changed(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults."""
        values = ((each, getattr(self, each.name)) for each in fields(self))
        return {each.name: value for each, value in values if value != each.default}

    def of_engines(self) -> list[Any]:
        """Return the values of those settings of which engines are made."""
        return [getattr(self, each.name) for each in fields(self) if each.metadata["engines"]]

    def in_words(self) -> dict[str, str]:
        """Return all settings as they are shown, code by its name."""
        return {each.name: shown(as_data(getattr(self, each.name))) for each in fields(self)}

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

    def at(self, step_size: StepSize | None) -> Settings:
        """Return the settings with another step_size, that of one call; None: as they are."""
        if step_size is None:
            return self
        return replace(self, step_size=step_size, learn_step_size=None)

    def steps(self, num_steps: int | None) -> int:
        """Return the inner steps that a method was given, checked; None: those of training."""
        if num_steps is None:
            return self.num_steps
        check_count("num_steps", num_steps, least=0, most=allowed.MOST_STEPS)
        return num_steps

    @property
    def schedule(self) -> float | Schedule:
        """ε as it was given, or what is right for the algorithm and the meta-optimizer."""
        if self.meta_step_size is None and self.meta_optimizer is not None:
            return 1.0
        if self.meta_step_size is None and not isinstance(self.step_size, float):
            default = schedule_of(None, self.algorithm, math.nan)
            if callable(default):
                return default
            raise ConfigurationError(
                ["meta_step_size is step_size by default, which is no single number: give one"]
            )
        one = self.step_size if isinstance(self.step_size, float) else math.nan
        return schedule_of(self.meta_step_size, self.algorithm, one)

    @property
    def nominal_rate(self) -> float:
        """The rate that the inner optimizer is made with: 1 where others multiply it."""
        alone = self.inner_schedule is None and self.learn_step_size is None
        return self.step_size if alone and isinstance(self.step_size, float) else 1.0

    def rates(self, learned: Learned, iteration: int, num_steps: int) -> Tensor | None:
        """Return the rate of each inner step and parameter; None where all are `nominal_rate`.

        Args:
            learned: the names of what moves.
            iteration: the number of the meta-iteration.
            num_steps: inner steps.
        """
        learns = self.learn_step_size is not None
        if self.inner_schedule is None and (learns or isinstance(self.step_size, float)):
            return None
        fraction = iteration / max(1, self.num_iterations)
        step_size = 1.0 if learns else self.step_size
        return rates(learned, step_size, fraction, self.inner_schedule, num_steps)

    def learned_rates(self, learned: Learned) -> LearnedRates | None:
        """Return how the inner rates are learned; None: they are not.

        Raises:
            ConfigurationError: the first ones change over the training.
        """
        if self.learn_step_size is None:
            return None
        each = self.step_size.values() if isinstance(self.step_size, Mapping) else [self.step_size]
        if any(map(callable, each)):
            raise ConfigurationError(
                [
                    "step_size is a schedule, and with learn_step_size it is what the rates begin "
                    "with: give a number, or a dictionary of numbers"
                ]
            )
        return LearnedRates(self.learn_step_size, learned)

    @property
    def optimizer_factory(self) -> OptimizerFactory:
        """The callable that makes the inner optimizer."""
        given = self.inner_optimizer
        return FACTORIES[given] if isinstance(given, str) else given

    def optimizer(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the inner optimizer of these parameters."""
        return make_optimizer(self.optimizer_factory, params, self.nominal_rate)


def check_count(name: str, value: Any, least: int = 1, most: int = allowed.MOST) -> None:
    """Check one whole number that a method was given.

    Raises:
        ConfigurationError: it is none from ``least`` to ``most``.
    """
    allowed.check(**{name: (value, allowed.count(least, most))})


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
    if isinstance(value, Mapping):
        rates = {name: as_data(rate) for name, rate in value.items()}
        return ("code", "step_size") if any(map(is_code, rates.values())) else rates
    if callable(value) or isinstance(value, Algorithm):
        return "code", getattr(value, "__qualname__", type(value).__qualname__)
    return value


def from_data(value: Any) -> Any:
    """Return the setting that `as_data` was given; code stays a name."""
    if isinstance(value, tuple) and value[0] in KNOWN:
        return KNOWN[value[0]](*map(from_data, value[1:]))
    if isinstance(value, Mapping):
        return {name: from_data(part) for name, part in value.items()}
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
