"""What a checkpoint may hold: the form of each field, and what must fit φ and the optimizers.

A checksum tells that a file is as it was written, not who wrote it. What is looked at here is what
would else end in an error of torch's, or, worse, in other numbers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koi import allowed
from koi.algorithms import algorithm_of
from koi.allowed import Check, Refused
from koi.configured import Configured
from koi.inner.optimizers.recognition import update_rule
from koi.phi.arithmetic import in_words
from koi.phi.outcome import Phi
from koi.phi.update import MetaUpdate
from koi.records import COLUMNS, ROW, History
from koi.settings import Settings, from_data, is_code
from koi.training import frozen
from koi.training.agreement import (
    arguments_of,
    different_optimizer,
    different_tensors,
    tensors_of,
)
from koi.training.past import history_from

if TYPE_CHECKING:
    from koi.training.checkpoint import Saved

_word = allowed.instance(str, "a word")
_tensor = allowed.instance(Tensor, "a tensor")
_flag = allowed.truth


def _fields(**checks: Check) -> Check:
    """Return a check of a dictionary with these entries and no others."""

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping) or set(value) != set(checks):
            raise Refused(f"a dictionary of {', '.join(checks)}")
        for name, may_be in checks.items():
            try:
                may_be(value[name])
            except Refused as refused:
                raise Refused(f"a dictionary, and {name} in it {refused}") from None
        return value

    return check


_number = allowed.that(lambda value: type(value) in (int, float), "a number")
_optimizer = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and isinstance(value.get("class"), str)
        and all(
            isinstance(part, bool | int | float | str | None)
            for each in value.values()
            for part in (each if isinstance(each, tuple) else (each,))
        )
    ),
    "the arguments of an optimizer and its class",
)
_state = allowed.that(
    lambda value: (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and all(type(n) is not int or isinstance(own, Mapping) for n, own in value["state"].items())
        and isinstance(value.get("param_groups"), list)
        and all(
            isinstance(group, Mapping)
            and isinstance(group.get("params"), list)
            and all(type(number) is int for number in group["params"])
            for group in value["param_groups"]
        )
    ),
    "what an optimizer's state_dict() gives",
)
_scale = allowed.that(
    lambda value: (
        isinstance(value, tuple)
        and [type(part) for part in value] == [float, int]
        and 0 < value[0] < float("inf")
        and value[1] >= 0
    ),
    "a factor above 0, and steps since it changed",
)
_tensors = allowed.each(_tensor, "tensors")
_owed = _fields(
    num_callbacks=allowed.count(0),
    validated=_flag,
    next_callback=allowed.count(0),
    ends=_flag,
    calling=_flag,
)
_best = _fields(
    iteration=allowed.count(0),
    value=_number,
    misses=allowed.count(0),
    phi=allowed.optional(_tensors),
    moments=allowed.optional(_tensors),
)

# Some are missing in what an earlier Koi has written.
_FORMS: dict[str, Check] = {
    "iteration": allowed.count(0),
    "engine": _word,
    "ruled_out": allowed.each(_word, "words"),
    "params": allowed.named(_tensor),
    "buffers": allowed.named(_tensor),
    "tensors": allowed.named(_word),
    "frozen": allowed.named(_word),
    "devices": allowed.each(_word, "words"),
    "moments": allowed.optional(_tensors),
    "moment_devices": allowed.each(_word, "words"),
    "learned_rates": _tensors,
    "scale": allowed.optional(_scale),
    "inner_optimizer": _optimizer,
    "meta_optimizer": allowed.optional(_optimizer),
    "meta_state": allowed.optional(_state),
    "mean": _fields(count=allowed.count(0), values=_tensors),
    "best": allowed.optional(_best),
    "owed": allowed.optional(_owed),
    "callbacks": allowed.optional(allowed.instance(list, "a list")),
    "drawn_seed": allowed.optional(allowed.count(0, most=2**64)),
    "settings": allowed.named(lambda value: value),
    "history": allowed.instance(Mapping, "a dictionary"),
}

# Settings that every Koi has had; those that came later have their defaults in older checkpoints.
_ALWAYS = (
    *("step_size", "num_steps", "num_iterations", "inner_optimizer", "inner_state", "algorithm"),
    *("meta_batch_size", "meta_step_size", "meta_optimizer", "seed"),
)


def check_form(data: Mapping[str, Any]) -> None:
    """Check the form of all that can be told without a model.

    Raises:
        ValueError: naming every field that is wrong.
    """
    problems = []
    for name, may_be in _FORMS.items():
        try:
            if name in data:
                may_be(data[name])
        except Refused as refused:
            problems.append(f"{name} must be {refused}")
    problems = problems or [*_wrong_together(data)]
    if problems:
        raise ValueError("; ".join(problems))


def _wrong_together(data: Mapping[str, Any]) -> Iterator[str]:
    if len(data["devices"]) != len(data["params"]):
        yield f"devices are {len(data['devices'])}, of {len(data['params'])} params"
    moments = data["moments"] or []
    if len(data["moment_devices"]) != len(moments):
        yield f"moment_devices are {len(data['moment_devices'])}, of {len(moments)} moments"
    if (data["meta_optimizer"] is None) != (data["meta_state"] is None):
        yield "meta_optimizer and meta_state go together"
    yield from (f"settings have no {name}" for name in _ALWAYS if name not in data["settings"])
    known = Settings().stored()
    for name, value in data["settings"].items():
        try:
            if is_code(value):
                _, _ = value  # by its name
            elif name in known:
                Settings(**{name: from_data(value)})
        except Exception as error:  # of a schedule with other parts, too
            yield f"settings: {name} cannot be {value!r} ({error})"


def history_of(data: Mapping[str, Any], path: Path | str) -> History:
    """Return the history in a checkpoint: the records of its last meta-iterations, in order.

    Raises:
        ValueError: it is none.
    """
    try:
        history = history_from(data["history"], path)
    except Exception as error:  # whatever stands there may be of any type
        raise ValueError(f"history: {error}") from error
    rows, iteration = bytearray(history.rows(0, len(history))), data["iteration"]
    if not rows:
        return history
    values = torch.frombuffer(rows, dtype=torch.float64).view(-1, ROW // 8)
    numbers = torch.arange(iteration - len(values), iteration, dtype=torch.float64)
    skipped = values[:, COLUMNS.index("num_skipped")]
    whole = skipped.isfinite() & (skipped == skipped.floor()) & (skipped >= 0)
    if numbers[0] < 0 or not torch.equal(values[:, 0], numbers) or not whole.all():
        raise ValueError(f"history is not that of the meta-iterations before {iteration}")
    return history


def other_model(koi: Configured, phi: Phi, saved: Saved) -> Iterator[str]:
    """Yield what differs in form, or, where nothing does, which frozen parameters do in value."""
    values = {**saved.params, **saved.buffers}
    if phi.names.shards is not None:  # of parameters these are rows
        values = saved.buffers
    problems = [*different_tensors(saved.tensors, tensors_of(koi.model), values)]
    yield from problems
    if not problems:
        yield from frozen.different_frozen(saved.frozen, phi.names.others_of(koi.model))


def other_optimizers(
    settings: Settings, phi: Phi, saved: Saved, free: tuple[str, ...]
) -> Iterator[str]:
    """Yield what differs in the optimizers whose state is carried on, but for ``free``."""
    if saved.moments and settings.inner_state == "carry":
        here = arguments_of(settings.optimizer(phi.names.those_adapted(phi.params)))
        yield from different_optimizer("inner_optimizer", saved.inner_optimizer, here, free)
    meta = MetaUpdate(algorithm_of(settings.algorithm), phi, settings.meta_optimizer).optimizer
    if saved.meta_optimizer is not None and meta is not None:
        here = arguments_of(meta)
        yield from different_optimizer("meta_optimizer", saved.meta_optimizer, here)


def misfits(saved: Saved, phi: Phi, settings: Settings) -> Iterator[str]:
    """Yield what does not fit a learner whose model and optimizers are those of a checkpoint.

    Args:
        saved: the checkpoint.
        phi: the learner's, without learned rates.
        settings: the learner's.
    """
    names = phi.names
    for what, there, here in (
        ("params", saved.params, names.params),
        ("buffers", saved.buffers, (*names.buffers, *names.constants)),
    ):
        missing = [name for name in here if name not in there]
        more = [name for name in there if name not in here]
        if missing or more:
            yield (
                f"{what}: the checkpoint has {_listed(more)} and not {_listed(missing)}: give "
                "adapts and learns as they were"
            )
            return
    kind, rates = saved.settings["learn_step_size"], saved.learned_rates
    if kind is not None and kind == settings.learn_step_size:
        length = (saved.settings["num_steps"],)
        places = names.those_adapted(phi.params)
        forms = [(p.shape if kind == "parameter" else length, p.real.dtype) for p in places]
        yield from _unlike("learned_rates", rates, forms)
    if saved.moments and settings.inner_state == "carry":
        adapted = names.those_adapted(phi.params)
        rule = update_rule(settings.optimizer(adapted), adapted)
        shapes = [m.shape for m in saved.moments] if rule is None else rule.shapes(phi.params)
        given: list[torch.dtype | None] = [m.dtype for m in saved.moments]
        if len(shapes) != len(given) or not any(p.is_complex() for p in phi.params):
            given = [None] * len(shapes)  # else moments can be complex, too
        yield from _unlike("moments", saved.moments, list(zip(shapes, given, strict=True)))
        counts = [] if rule is None else saved.moments[rule.num_slots * len(phi.params) :]
        if any(bool((count.real < 0).any()) for count in counts):
            yield "moments: a negative number of steps"
        best = [] if saved.best is None else saved.best["moments"] or []
        if len(best) == len(saved.moments):  # else it is another inner_optimizer's
            yield from _unlike("best", best, [(m.shape, m.dtype) for m in saved.moments])
    of_rates = rates if kind is not None else []
    if saved.mean["count"]:
        learned = [*names.those_learned(phi.params), *of_rates, *phi.buffers]
        yield from _unlike("mean", saved.mean["values"], [(t.shape, t.dtype) for t in learned])
    if saved.best is not None and saved.best["phi"] is not None:
        whole = [*phi.params, *phi.buffers, *phi.constants, *of_rates]
        yield from _unlike("best", saved.best["phi"], [(t.shape, t.dtype) for t in whole])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "nothing more"


def _unlike(
    what: str, found: Sequence[Tensor], forms: Sequence[tuple[Any, torch.dtype | None]]
) -> Iterator[str]:
    """Yield what is amiss in the first of some tensors that has another form, or NaN in it.

    Args:
        what: the field.
        found: the tensors.
        forms: a shape for each, and a type; None: any of floating-point numbers.
    """
    if len(found) != len(forms):
        yield f"{what}: {len(found)} tensors, where {len(forms)} are meant"
        return
    for place, (tensor, (shape, dtype)) in enumerate(zip(found, forms, strict=True)):
        same = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not same:
            kind = "floating-point numbers" if dtype is None else str(dtype).removeprefix("torch.")
            wanted = f"shape {tuple(shape)}, {kind}"
            yield f"{what}: tensor {place} has {in_words(tensor)}, where {wanted} is meant"
            return
        if bool(tensor.isnan().any()):
            yield f"{what}: tensor {place} has NaN in it"
            return


def misfits_of_state(optimizer: torch.optim.Optimizer, groups: Iterable[Any]) -> Iterator[str]:
    """Yield what in the state that an optimizer was given is none that it can have come to.

    It is compared with what one of its kind keeps after a step; of optimizers that are not torch's
    own nothing is known.

    Args:
        optimizer: it has taken the state.
        groups: the parameter groups that were stored.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return
    numbers = [*itertools.chain.from_iterable(group["params"] for group in groups)]
    if numbers != list(range(len(numbers))):
        yield "param_groups do not number the parameters in order"
        return
    known, place = inspect.signature(kind).parameters, itertools.count()
    for group in optimizer.param_groups:
        params = [torch.empty_like(p, device="meta", requires_grad=True) for p in group["params"]]
        given = {name: value for name, value in group.items() if name in known and name != "params"}
        plain = {name: False for name in ("foreach", "fused", "capturable") if name in known}
        try:
            made = kind(params, **given | plain)
        except Exception as error:  # whatever an argument of another type leads to
            yield f"param_groups: {error}"
            return
        missing = made.param_groups[0].keys() - group.keys()
        other = [n for n, v in optimizer.defaults.items() if not missing and _is_other(v, group[n])]
        if missing or other:
            what = "missing" if missing else "of another type"
            yield f"param_groups: {', '.join(sorted(missing) or other)} is {what}"
            return
        for param in params:
            param.grad = torch.empty_like(param)
        try:
            made.step()
        except Exception:  # as one that needs a closure, or values
            return
        for own, fresh in zip(group["params"], params, strict=True):
            number = next(place)
            if optimizer.state:
                yield from _unlike_state(number, optimizer.state.get(own, {}), made.state[fresh])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _numbers_of(tensor: Tensor, name: str) -> Any:
    """Return the type of what is kept; steps are counted in any that is a number's."""
    kind = tensor.is_complex(), tensor.is_floating_point()
    return kind if name == "step" else tensor.dtype


def _is_other(default: Any, value: Any) -> bool:
    """Return whether an entry of a parameter group is of another kind than its default."""
    if isinstance(default, tuple):
        return not (isinstance(value, tuple) and len(value) == len(default))
    if default is None or isinstance(default, bool):
        return not (value is None or isinstance(value, bool))
    if isinstance(value, int) and abs(value) >= 2**63:  # of which torch makes no number
        return True
    if isinstance(value, Tensor) and value.numel() != 1:
        return True
    number = isinstance(default, int | float | Tensor)
    return number and (isinstance(value, bool) or not isinstance(value, int | float | Tensor))


def _unlike_state(number: int, own: Mapping[str, Any], fresh: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs in form between what is kept of a parameter and what would be."""
    if set(own) != set(fresh):
        yield (
            f"of parameter {number} it has {', '.join(map(str, own)) or 'nothing'}, where "
            f"{', '.join(map(str, fresh)) or 'nothing'} is meant"
        )
        return
    for name, value in own.items():
        one, other = (
            v if isinstance(v, Tensor) else torch.tensor(float(v)) if _is_number(v) else None
            for v in (value, fresh[name])
        )
        if one is None or other is None:
            if value is not None or fresh[name] is not None:
                yield f"{name} of parameter {number} is no number"
            continue
        if one.shape != other.shape or _numbers_of(one, name) != _numbers_of(other, name):
            yield f"{name} of parameter {number} has {in_words(one)}, not {in_words(other)}"
        elif bool(one.isnan().any()) or (name == "step" and bool((one < 0).any())):
            yield f"{name} of parameter {number} is negative or NaN"
