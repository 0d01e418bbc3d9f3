"""Tasks that adapt a module by themselves: ``adapt(model, num_steps)`` in the place of ``loss``.

Koi knows nothing of such an inner loop but where it ends, which is all that Reptile needs. It runs
on the working copy of the module, one task at a time.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from koi.algorithms import named
from koi.errors import ConfigurationError, EngineError, TaskError
from koi.inner.base import InnerLoop
from koi.phi.outcome import Phi
from koi.tasks import has_own_loop


def check_alike(tasks: list[Any]) -> None:
    """Check that of the tasks of a meta-batch all, or none, adapt by themselves.

    Raises:
        TaskError: they do not, so that the record of their losses would be of some.
    """
    kinds = {has_own_loop(task) for task in tasks}
    if len(kinds) > 1:
        raise TaskError(
            "one meta-batch holds tasks with an inner loop of their own, adapt(model, num_steps), "
            "and tasks with a loss alone: give all of them the one or the other"
        )


def check_engine(task: Any, vectorize: bool | str, compile: bool | str) -> None:
    """Check that nothing is asked of the engine which takes knowing the inner loop.

    Raises:
        EngineError: it is.
    """
    wanted = "vectorize=True" if vectorize is True else f"compile={compile!r}" if compile else ""
    if wanted:
        raise EngineError(
            f"{type(task).__name__} has an inner loop of its own, adapt(model, num_steps), which "
            f"runs as it is, one task after the other, and {wanted} was asked for: use "
            "vectorize=False, compile=False"
        )


def check_algorithm(task: Any, inner: InnerLoop) -> None:
    """Check that an algorithm needs no more than where the inner loop ends.

    Raises:
        ConfigurationError: it does.
    """
    algorithm = inner.algorithm
    if algorithm.query_gradient or algorithm.trajectory:
        what = "a gradient through" if algorithm.query_gradient else "each step of"
        raise ConfigurationError(
            [
                f"algorithm={named(algorithm)} needs {what} the inner loop, and "
                f"{type(task).__name__} has one of its own, adapt(model, num_steps), of which the "
                "end alone is known: use algorithm='reptile'"
            ]
        )


def adapt_by_itself(task: Any, module: nn.Module, inner: InnerLoop, num_steps: int) -> None:
    """Let a task train the module; no step, and nothing is called.

    Raises:
        TaskError: it trained another module, or other parameters.
    """
    params = inner.learned.params_of(module)
    for param in params:
        param.grad = None
        param.requires_grad_()
    given = task.adapt(module, num_steps) if num_steps > 0 else None
    for param in params:
        param.grad = None
    now = dict(module.named_parameters(remove_duplicate=False))
    for name, param in zip(inner.learned.params, params, strict=True):
        if now.get(name) is not param:
            raise TaskError(
                f"adapt of {type(task).__name__} replaced the parameter {name!r}: it must change "
                "it in place, as an optimizer or copy_() under torch.no_grad() does"
            )
    if isinstance(given, nn.Module) and given is not module:
        raise TaskError(
            f"adapt of {type(task).__name__} returned another module: it must train the one that "
            "it is given, in place"
        )


def check_settings(task: Any, module: nn.Module, inner: InnerLoop, phi: Phi) -> None:
    """Check that no setting would have to reach into the inner loop.

    Nor must what ``adapts`` leaves where it is, since it is the user's own.

    Raises:
        ConfigurationError: naming those that would.
    """
    others = inner.learned.others_of(module).values()
    given = {
        "adapts": inner.learned.adapted is not None or any(p.requires_grad for p in others),
        "clip_inner": inner.clip is not None,
        "inner_schedule, or a step_size that is no single number": phi.rates is not None,
        "autocast": inner.autocast is not None,
    }
    names = " and ".join(name for name, is_given in given.items() if is_given)
    if names:
        raise ConfigurationError(
            [
                f"{names} was given, which cannot reach into the inner loop of "
                f"{type(task).__name__}, its own adapt(model, num_steps): leave it out, and do "
                "there what it would (parameters with requires_grad=False stay as they are)"
            ]
        )


def check_measured(query: Any) -> None:
    """Check that there is something to measure of a task that adapts by itself.

    Raises:
        TaskError: there is not.
    """
    if not callable(getattr(query, "loss", None)):
        raise TaskError(
            f"there is nothing to measure of {type(query).__name__}, which has adapt(model, "
            "num_steps) and no loss: give it a property query, a task with loss(model), or take "
            "koi.measure(tasks, metric)"
        )
