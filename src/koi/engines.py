"""The engines that fit a learner as it is now."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koi.algorithms import Algorithm, algorithm_of, named
from koi.errors import ConfigurationError
from koi.inner.base import InnerLoop
from koi.inner.checks.granted import ClassLook, Look, Same, environment, frozen
from koi.inner.dispatch import Dispatch
from koi.inner.optimizers.recognition import update_rule, why_no_rule
from koi.inner.optimizers.rules import UpdateRule, layout_of, of_part
from koi.inner.scaling import LossScale
from koi.inner.sharded import check_sharded
from koi.memory import keep_what_is_freed
from koi.phi.arithmetic import Tensors
from koi.phi.learned import Learned
from koi.settings import Settings

log = logging.getLogger("koi")

# Compiled engines are kept for the case that a change is undone, as of a mode.
_KEPT = 8


class Ready(NamedTuple):
    """Engines, what they were made of, and φ's parameters, buffers and constants."""

    key: Any
    inner: InnerLoop
    engines: Dispatch
    tensors: tuple[Tensors, Tensors, Tensors]


class Engines:
    """Makes engines, and makes them anew where anything that they take for granted has changed.

    That is each setting, what the model holds besides the values of parameters and buffers, and,
    for a graph, what its classes hold and torch's own switches (`koi.inner.checks.granted`).
    """

    def __init__(self) -> None:
        self._look: Look | None = None
        self._kinds: frozenset[type] = frozenset()
        self._classes: dict[frozenset[type], ClassLook] = {}
        self._settings: tuple[Settings | None, Any] = (None, None)
        self._kept: list[Ready] = []
        self._changes = 0  # within one training

    def __reduce__(self) -> Any:
        """Let a copy, or another process, make engines of its own."""
        return Engines, ()

    def ready(
        self,
        model: nn.Module,
        settings: Settings,
        scale: LossScale | None,
        before: Ready | None = None,
    ) -> Ready:
        """Return the inner loop and the engines for a learner as it is now.

        Args:
            model: its model.
            settings: its settings.
            scale: the loss scale of float16.
            before: what the last meta-iteration of the same training ran with: what it found
                impossible stays so, and where something changes all the time, engines are checked
                after 1, 2, 4, 8 … changes.
        """
        key = self._key(model, settings, scale)
        for ready in self._kept:
            if ready.key == key:
                if ready is not self._kept[0]:
                    self._kept.remove(ready)
                    self._kept.insert(0, ready)
                return ready
        self._changes = 0 if before is None else self._changes + 1
        compile = settings.compile
        if compile and self._changes >= _KEPT:
            if self._changes == _KEPT:  # said once
                log.warning(
                    "what a graph takes for granted has changed %d times in this training: running "
                    "uncompiled from here on",
                    self._changes,
                )
            compile = False
        keep_what_is_freed()
        engines = Dispatch(
            model,
            inner := inner_loop(model, settings, scale),
            vectorize=settings.vectorize,
            compile=compile,
            chunk_size=settings.chunk_size,
            check=settings.check and self._changes & (self._changes - 1) == 0,
        )
        if before is not None and before.key[0] == key[0]:
            engines.refused |= before.engines.refused
        learned = inner.learned
        tensors = (
            *(learned.params_of(model), learned.buffers_of(model)),
            learned.constants_of(model),
        )
        ready = Ready(key, inner, engines, tensors)
        self._kept = [ready, *self._kept[: _KEPT - 1 if settings.compile else 0]]
        return ready

    def _key(self, model: nn.Module, settings: Settings, scale: LossScale | None) -> Any:
        if self._look is None or self._look.module is not model or not self._look.unchanged():
            settings.learned(model)  # says what cannot be looked at, such as a scripted module
            self._look = Look(model)
            self._kinds = frozenset(map(type, model.modules()))
        if self._settings[0] is not settings:
            self._settings = settings, tuple(map(frozen, settings.of_engines()))
        graph = (self._classes_now(), environment()) if settings.compile else ()
        optimizer = _optimizer_now(model, settings)
        return self._settings[1], optimizer, self._look.held, scale, graph

    def _classes_now(self) -> Same:
        """Return what stands for all that the classes of the model's parts hold now."""
        if self._kinds not in self._classes:
            self._classes[self._kinds] = ClassLook(self._kinds)
        return self._classes[self._kinds].now()


def _optimizer_now(model: nn.Module, settings: Settings) -> Any:
    """Return the settings of the inner optimizer as a factory that may read others makes it now.

    A name, a class or a partial of one always makes the same.
    """
    factory = settings.inner_optimizer
    if isinstance(factory, str | type) or (
        isinstance(factory, functools.partial) and isinstance(factory.func, type)
    ):
        return ()
    learned = settings.learned(model)
    params = learned.those_adapted(learned.params_of(model))
    optimizer = settings.optimizer(params)
    numbers = [
        value.tolist()
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and isinstance(value, Tensor)
    ]
    return type(optimizer), layout_of(optimizer, params), numbers


def inner_loop(model: nn.Module, settings: Settings, scale: LossScale | None) -> InnerLoop:
    """Read what learns off a model as it is now, and the inner optimizer.

    Args:
        model: the user's module.
        settings: the learner's.
        scale: the loss scale of float16; None: no scale.

    Raises:
        ConfigurationError: the algorithm and the optimizer, or the model, do not go together.
    """
    learned = settings.learned(model)
    params = learned.params_of(model)
    optimizer = settings.optimizer(learned.those_adapted(params))
    algorithm = algorithm_of(settings.algorithm)
    _check_roles(learned, algorithm)
    if learned.shards is not None:
        check_sharded(settings, params, optimizer)
    settings.at(settings.step_size).rates(
        learned, 0, settings.num_steps
    )  # says which name is unknown
    learned_rates = settings.learned_rates(learned)
    if algorithm.second_order:
        _check_differentiable(algorithm, optimizer)
    _check_sparse(model, algorithm, optimizer)
    rule = update_rule(optimizer, params, differentiable=algorithm.second_order)
    if rule is None and isinstance(settings.step_size, Mapping):
        raise ConfigurationError(
            [
                "step_size by names works with torch.optim's SGD, Adam and AdamW as they come, and "
                f"here {why_no_rule(optimizer)}: let inner_optimizer make groups of its params, "
                "each with its rate"
            ]
        )
    if learned_rates is not None:
        _check_learned_rates(algorithm, rule, optimizer)
    return InnerLoop(
        learned,
        algorithm,
        of_part(settings.optimizer_factory, learned.adapted),
        settings.nominal_rate,
        rule,
        autocast=settings.autocast,
        scale=scale,
        skip_nonfinite=settings.on_nonfinite == "skip",
        layout=layout_of(optimizer, params),
        clip=settings.clip_inner,
        learned_rates=learned_rates,
    )


def _check_learned_rates(
    algorithm: Algorithm, rule: UpdateRule | None, optimizer: torch.optim.Optimizer
) -> None:
    """Check that rates have a gradient to be learned by.

    Raises:
        ConfigurationError: the algorithm has none, or the optimizer no rule.
    """
    if not algorithm.query_gradient:
        raise ConfigurationError(
            [
                f"algorithm={named(algorithm)} has no gradient of the query loss, by which "
                "learn_step_size could learn: choose 'fomaml' or 'maml', or leave it out"
            ]
        )
    if rule is None:
        raise ConfigurationError(
            [
                "learn_step_size works with torch.optim's SGD, Adam and AdamW as they come, and "
                f"here {why_no_rule(optimizer)}: choose one of these, or leave it out"
            ]
        )


def _check_roles(learned: Learned, algorithm: Algorithm) -> None:
    """Check that what is learned and not adapted has an outer gradient.

    Raises:
        ConfigurationError: the algorithm has none.
    """
    adapted = set(learned.those_adapted(learned.params))
    constant = [name for name in learned.params if name not in adapted]
    if constant and not algorithm.query_gradient:
        shown = ", ".join(constant[:3]) + (", …" if len(constant) > 3 else "")
        raise ConfigurationError(
            [
                f"algorithm={named(algorithm)} learns from where the inner loop ends, and adapts= "
                f"leaves {shown} where it is: give learns= without it, or choose 'fomaml' or "
                "'maml', which have a gradient for it"
            ]
        )


def _check_sparse(model: nn.Module, algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
    """Check that nothing which torch has for dense gradients alone meets sparse ones.

    Raises:
        ConfigurationError: second order, or Adam inside, and an embedding with sparse=True.
    """
    if algorithm.second_order:
        what, other = f"algorithm={named(algorithm)}", "algorithm='fomaml'"
    elif type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        what, other = f"{type(optimizer).__name__} inside", "inner_optimizer='sgd'"
    else:
        return
    for name, part in model.named_modules():
        sparse = isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        if sparse and part.weight.requires_grad:
            raise ConfigurationError(
                [
                    f"{what} does not work with the sparse gradients of the {type(part).__name__} "
                    f"{name!r}: make it with sparse=False, or take {other}"
                ]
            )


def _check_differentiable(algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
    """Check that an algorithm of second order can differentiate through an inner optimizer."""
    reason = why_no_rule(optimizer)
    if reason is not None:
        raise ConfigurationError(
            [
                f"algorithm={named(algorithm)} differentiates through the inner optimizer, which "
                "works for torch.optim's SGD, Adam and AdamW as they come (one parameter group, "
                "settings that are numbers, no dampening, amsgrad, maximize or capturable, no step "
                f"hooks, no wrapped step, real parameters with Adam), and here {reason}: change "
                "that, or choose 'fomaml'"
            ]
        )


def check_surroundings(device_type: str) -> None:
    """Check that no mode of torch that is on around the call would act on a part of it.

    Raises:
        ConfigurationError: torch.inference_mode or torch.autocast is on.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigurationError(
            [
                "torch.inference_mode() is on, in which there are no gradients to adapt by: leave "
                "it for this call, or take torch.no_grad(), in which Koi works"
            ]
        )
    for kind in {"cpu", "cuda", device_type}:
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            raise ConfigurationError(
                [
                    "torch.autocast is on, and would act on more than the losses, in some engines "
                    f"only: leave it for this call, and give autocast={dtype} to Koi"
                ]
            )
