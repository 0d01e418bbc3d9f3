"""A learner's constructor, help and attributes, made of its settings."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from koi.errors import ConfigurationError, did_you_mean, wrong
from koi.settings import Settings, as_data, shown

Given = ParamSpec("Given")
AnySettings = TypeVar("AnySettings", bound=Settings)
AnyLearner = TypeVar("AnyLearner", bound="Configured")
AnyType = TypeVar("AnyType", bound=type)


class Configured:
    """A model and settings that are attributes of it, too.

    What is set goes through the checks, and takes effect, wholly, at the next meta-iteration.
    """

    model: nn.Module
    settings: Settings

    @property
    @abstractmethod
    def iteration(self) -> int:
        """Meta-iterations done."""

    def __repr__(self) -> str:
        given = {name: shown(as_data(value)) for name, value in self.settings.changed().items()}
        given["iteration"] = str(self.iteration)
        words = [type(self.model).__name__, *(f"{name}={text}" for name, text in given.items())]
        return f"{type(self).__name__}({', '.join(words)})"

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings")  # none yet in a copy that is being made
        if name in _values(settings):
            return getattr(settings, name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}", name=name, obj=self
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            ConfigurationError: a setting cannot work, or it is the model, which stays.
        """
        if name == "settings" and not isinstance(value, Settings):
            allowed = "made by dataclasses.replace(koi.settings, step_size=…, …)"
            raise ConfigurationError([wrong(name, value, allowed)])
        if name in _values(self.__dict__.get("settings")):
            name, value = "settings", replace(self.settings, **{name: value})
        elif name == "model" and value is not self.__dict__.get("model", value):
            raise ConfigurationError(
                ["koi.model cannot be replaced: its weights are φ; make a new Koi for a new model"]
            )
        object.__setattr__(self, name, value)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *_values(self.settings)]


def _values(settings: Settings | None) -> dict[str, Any]:
    return {} if settings is None else vars(settings)


def takes(
    kind: Callable[Given, AnySettings],
) -> Callable[
    [Callable[[AnyLearner, nn.Module, AnySettings], None]],
    Callable[Concatenate[AnyLearner, nn.Module, Given], None],
]:
    """Let a constructor (model, settings) be called with a model and each setting by its name.

    Its signature, also that which type checkers see, is that of the model and of ``kind``, a class
    of settings. The model's mistakes and the settings' are reported at once.
    """
    make: Callable[..., AnySettings] = kind
    own = inspect.signature(kind).parameters

    def decorate(
        initialise: Callable[[AnyLearner, nn.Module, AnySettings], None],
    ) -> Callable[Concatenate[AnyLearner, nn.Module, Given], None]:
        first = list(inspect.signature(initialise).parameters.values())[:2]
        signature = inspect.Signature([*first, *own.values()], return_annotation=None)

        def constructor(self: AnyLearner, /, *args: Any, **kwargs: Any) -> None:
            try:
                given = signature.bind(self, *args, **kwargs).arguments
            except TypeError as error:
                near = [did_you_mean(name, own) for name in kwargs if name not in own]
                raise TypeError(f"{type(self).__name__}: {error}{''.join(near)}") from None
            del given["self"]
            initialise(self, *_checked(make, given.pop("model"), given))

        functools.update_wrapper(constructor, initialise)
        constructor.__signature__ = signature  # type: ignore[attr-defined]
        return constructor

    return decorate


def _checked(
    make: Callable[..., AnySettings], model: Any, given: dict[str, Any]
) -> tuple[nn.Module, AnySettings]:
    problems: list[str] = []
    if not isinstance(model, nn.Module):
        problems.append(wrong("model", model, "a torch.nn.Module"))
    try:
        settings = make(**given)
    except ConfigurationError as error:
        problems += error.problems
    if problems:
        raise ConfigurationError(problems)
    return model, settings


def documented(kind: type[Settings]) -> Callable[[AnyType], AnyType]:
    """Put what is said of each setting in the place of a docstring's line "settings: …"."""
    lines = (f"{each.name}: {each.metadata['doc']}" for each in fields(kind))
    wrapped = (textwrap.wrap(line, 88, subsequent_indent="    ") for line in lines)

    def decorate(learner: AnyType) -> AnyType:
        def spelled_out(place: re.Match[str]) -> str:
            return "\n".join(place["indent"] + line for lines in wrapped for line in lines)

        doc = learner.__doc__ or ""  # none under python -OO
        learner.__doc__ = re.sub(r"^(?P<indent> +)settings: .*$", spelled_out, doc, flags=re.M)
        return learner

    return decorate
