"""Checks of everything a user can pass to `koi.Koi`, all mistakes reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from koi.algorithms import NAMED, Algorithm, algorithm_of, named
from koi.errors import ConfigurationError, did_you_mean
from koi.inner.base import InnerLoop
from koi.inner.optimizers.recognition import update_rule, why_no_rule
from koi.inner.optimizers.rules import FACTORIES, OptimizerFactory, layout_of, make_optimizer
from koi.inner.scaling import LossScale
from koi.phi.parameters import Learned

INNER_STATES = ("carry", "reset")
ON_NONFINITE = ("raise", "skip")
AUTOCAST = (None, torch.bfloat16, torch.float16)


def check_settings(
    *,
    model: Any,
    step_size: Any,
    num_steps: Any,
    num_iterations: Any,
    meta_step_size: Any,
    meta_batch_size: Any,
    inner_optimizer: Any,
    inner_state: Any,
    meta_optimizer: Any,
    algorithm: Any,
    vectorize: Any,
    compile: Any,
    seed: Any,
    on_nonfinite: Any,
    chunk_size: Any,
    autocast: Any,
    check: Any,
) -> None:
    """Check the arguments of `koi.Koi`.

    Raises:
        ConfigurationError: listing every argument that is wrong, with what is allowed.
    """
    problems = [
        None if isinstance(model, nn.Module) else _wrong("model", model, "a torch.nn.Module"),
        _number("step_size", step_size, positive=True),
        _count("num_steps", num_steps, least=1),
        _count("num_iterations", num_iterations, least=0),
        _schedule(meta_step_size),
        _count("meta_batch_size", meta_batch_size, least=1),
        _choice("inner_optimizer", inner_optimizer, FACTORIES, " or a callable (params, lr)"),
        _choice("inner_state", inner_state, INNER_STATES),
        None
        if meta_optimizer is None or callable(meta_optimizer)
        else _wrong("meta_optimizer", meta_optimizer, "None or a callable (params)"),
        _algorithm(algorithm),
        _choice("vectorize", vectorize, ("auto", True, False)),
        None
        if isinstance(compile, bool | str)
        else _wrong("compile", compile, "True, False or a mode of torch.compile"),
        None if seed is None else _count("seed", seed, least=0),
        _choice("on_nonfinite", on_nonfinite, ON_NONFINITE),
        None if chunk_size is None else _count("chunk_size", chunk_size, least=1),
        _choice("autocast", autocast, AUTOCAST),
        _choice("check", check, (True, False)),
    ]
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ConfigurationError(found)


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


def check_sparse(model: nn.Module, algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
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


def check_differentiable(algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
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


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check one whole number, as `check` does."""
    problem = _count(name, value, least)
    if problem is not None:
        raise ConfigurationError([problem])


def check_tasks(tasks: Any) -> None:
    """Check that ``tasks`` is a task distribution."""
    if not callable(getattr(tasks, "sample", None)) and not hasattr(tasks, "sample_batch"):
        hint = " (this looks like one task: give the object that samples them)"
        raise ConfigurationError(
            [
                _wrong("tasks", tasks, "an object with a method sample() -> task")
                + (hint if hasattr(tasks, "loss") else "")
            ]
        )


def inner_factory(inner_optimizer: str | OptimizerFactory) -> OptimizerFactory:
    """Return the factory of a checked ``inner_optimizer``."""
    return FACTORIES[inner_optimizer] if isinstance(inner_optimizer, str) else inner_optimizer


def inner_loop(koi: Any, scale: LossScale | None) -> InnerLoop:
    """Read what learns off a learner's model as it is now, and the inner optimizer.

    Args:
        koi: a `koi.Koi`, whose attributes are its checked settings.
        scale: the loss scale of float16; None: no scale.
    """
    learned = Learned.of(koi.model)
    factory = inner_factory(koi.inner_optimizer)
    params = learned.params_of(koi.model)
    optimizer = make_optimizer(factory, params, koi.step_size)
    algorithm = algorithm_of(koi.algorithm)
    if algorithm.second_order:
        check_differentiable(algorithm, optimizer)
    check_sparse(koi.model, algorithm, optimizer)
    return InnerLoop(
        learned,
        algorithm,
        factory,
        koi.step_size,
        update_rule(optimizer, params, differentiable=algorithm.second_order),
        autocast=koi.autocast,
        scale=scale,
        skip_nonfinite=koi.on_nonfinite == "skip",
        layout=layout_of(optimizer, params),
    )


def _wrong(name: str, value: Any, allowed: str) -> str:
    return f"{name} = {value!r}: must be {allowed}"


def _number(name: str, value: Any, positive: bool = False) -> str | None:
    valid = isinstance(value, Real) and not isinstance(value, bool)
    if valid and _is_finite(value) and (value > 0 if positive else value >= 0):
        return None
    return _wrong(name, value, f"a finite number {'above' if positive else 'of at least'} 0")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _count(name: str, value: Any, least: int) -> str | None:
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return None
    return _wrong(name, value, f"a whole number of at least {least}")


def _schedule(value: Any) -> str | None:
    if value is None or callable(value) or _number("", value) is None:
        return None
    return _wrong(
        "meta_step_size",
        value,
        "a finite number of at least 0, a callable of the fraction done such as "
        "koi.linear(1.0, 0.0), or None",
    )


def _algorithm(value: Any) -> str | None:
    if isinstance(value, str) and value in NAMED:
        return None
    if not isinstance(value, Algorithm):
        options = ", ".join(map(repr, NAMED))
        allowed = f"one of {options}, or an object such as koi.algorithms.Reptile()"
        return _wrong("algorithm", value, allowed) + did_you_mean(value, NAMED)
    kind = type(value).__name__
    if "__dataclass_params__" not in vars(type(value)):
        allowed = f"data: put @dataclass(frozen=True) above the class {kind}"
        return _wrong("algorithm", value, allowed)
    if value.second_order and not value.query_gradient:
        allowed = f"consistent: {kind} has second_order = True, so give it query_gradient = True"
        return _wrong("algorithm", value, allowed)
    return None


def _choice(name: str, value: Any, allowed: Iterable[Any], more: str = "") -> str | None:
    allowed = tuple(allowed)
    if any(value is option or (isinstance(value, str) and value == option) for option in allowed):
        return None
    if more and callable(value):
        return None
    options = ", ".join(map(repr, allowed))
    hint = did_you_mean(value, [option for option in allowed if isinstance(option, str)])
    return _wrong(name, value, f"one of {options}{more}") + hint
