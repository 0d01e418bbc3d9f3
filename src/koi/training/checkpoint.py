"""What a checkpoint holds, and how a learner goes on from it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koi import storage
from koi.algorithms import algorithm_of
from koi.configured import Configured
from koi.errors import CheckpointError, annotate
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.average import ExponentialMean
from koi.phi.outcome import Phi
from koi.phi.update import MetaUpdate
from koi.randomness import States, checked
from koi.records import History
from koi.settings import Settings, from_data, is_code
from koi.training import frozen, held, stateful
from koi.training.agreement import arguments_of, different_settings, tensors_of
from koi.training.interrupts import uninterrupted
from koi.training.past import Past, stored_history
from koi.training.state import Best, Mark, Owed, Pending, TrainingState, stored_rates

Data = dict[str, Any]

_VERSION = version("koi-x")


def contents(koi: Configured, state: TrainingState, past: Past | None = None) -> Data:
    """Return everything that training needs to go on: of φ and moments the tensors, not copies.

    Args:
        koi: the learner, between two meta-iterations.
        state: what it has come to.
        past: a file for older records; None: all are in it.
    """
    settings, at = koi.settings, state.mark(koi.settings)
    learned = settings.learned(koi.model)
    params, moments = learned.params_of(koi.model), state.carried(settings)
    names = (*learned.buffers, *learned.constants)
    meta = None if state.update is None else state.update.optimizer
    callbacks: list[Any] | None
    if state.pending is None:
        callbacks = [owner.state_dict() for owner in state.callbacks]
    else:
        callbacks = state.pending.callbacks
    return {
        "koi": _VERSION,
        "torch": str(torch.__version__),
        "settings": settings.stored(),
        "iteration": state.iteration,
        "engine": state.engine,
        "ruled_out": sorted(state.ruled_out),
        "history": stored_history(state.history, past),
        "params": {name: p.detach() for name, p in zip(learned.params, params, strict=True)},
        "buffers": {name: koi.model.get_buffer(name) for name in names},
        "tensors": tensors_of(koi.model),
        "frozen": frozen.digests(learned.others_of(koi.model)),
        "devices": [str(p.device) for p in params],
        "moments": moments,
        "moment_devices": [str(m.device) for m in moments or []],
        "learned_rates": state.rates(params, learned, settings),
        "scale": None if state.scale is None else state.scale.state(),
        "inner_optimizer": arguments_of(settings.optimizer(learned.those_adapted(params))),
        "meta_optimizer": None if meta is None else arguments_of(meta),
        "meta_state": None if meta is None else meta.state_dict(),
        "mean": {"count": state.mean.count, "values": state.mean.values},
        "best": None if state.best is None else vars(state.best),
        "owed": None if state.owed is None else vars(state.owed.in_a_file()),
        "tasks": at.tasks,
        "callbacks": callbacks,
        "generators": None if at.generators is None else _plain(at.generators),
        "drawn_seed": at.seed,
    }


def save(koi: Configured, state: TrainingState, path: Path, past: Past | None = None) -> None:
    """Write a checkpoint, Ctrl-C held back.

    Raises:
        CheckpointError: it cannot be written.
    """
    storage.write(path, contents(koi, state, past))


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read; the fields are what `contents` gives."""

    path: Path | str
    settings: Data
    iteration: int
    engine: str
    ruled_out: frozenset[str]
    history: History
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tensors: dict[str, str]
    devices: list[str]
    moments: Tensors | None
    moment_devices: list[str]
    scale: tuple[float, int] | None
    inner_optimizer: Data
    meta_optimizer: Data | None
    meta_state: Data | None
    mark: Mark
    frozen: dict[str, str] = field(default_factory=dict)
    learned_rates: Tensors = field(default_factory=list)
    callbacks: list[Any] | None = None
    owed: Owed | None = None
    mean: Data = field(default_factory=lambda: {"count": 0, "values": []})
    best: Data | None = None

    def code(self) -> dict[str, str]:
        """Return the names of settings that were code, and what code it was."""
        return {name: value[1] for name, value in self.settings.items() if is_code(value)}


def read(path: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, of another program or of a newer Koi.
    """
    return saved_from(storage.read(path), path)


def read_or_offer(path: Path) -> Saved:
    """Read a checkpoint; an error says which of the files before it can be read.

    Raises:
        CheckpointError: as `read`.
    """
    try:
        return read(path)
    except CheckpointError as error:
        annotate(error, offer_instead_of(path))
        raise


def saved_from(data: Mapping[str, Any], path: Path | str) -> Saved:
    """Return what `contents` gave; ``path`` is what errors name.

    Raises:
        CheckpointError: something is missing.
    """
    try:
        names = [known.name for known in fields(Saved)]
        kept = {name: data[name] for name in names if name in data}
        generators = data["generators"]
        states = None if generators is None else checked(States(*generators))
        held.check_form(data)
        kept["settings"] = {**Settings().stored(), **data["settings"]}  # some may be newer
        kept["ruled_out"] = frozenset(data["ruled_out"])
        kept["history"] = held.history_of(data, path)
        kept["owed"] = None if data.get("owed") is None else Owed(**data["owed"])
        return Saved(path=path, mark=Mark(data["tasks"], states, data["drawn_seed"]), **kept)
    except Exception as error:  # whatever stands there may be of any type
        problem = f"is not whole ({type(error).__name__}: {error}): use an earlier one"
        if not {"params", "settings"} & set(data):
            problem = "holds no learner: give a file that koi.save or koi.train wrote"
        raise CheckpointError(f"the checkpoint {path} {problem}") from error


def arguments(saved: Saved, given: Data, known: Collection[str]) -> Data:
    """Return the settings of a learner that is made to go on from a checkpoint.

    Args:
        saved: the checkpoint.
        given: settings that replace those in it, or that a file cannot hold.
        known: the names of all that there are.

    Raises:
        CheckpointError: settings that are code are missing, or there are some of a newer Koi.
    """
    code = saved.code()
    missing = [name for name in code if name not in given]
    if missing:
        named = " and ".join(f"{name} ({code[name]})" for name in missing)
        again = ", ".join(f"{name}=…" for name in missing)
        raise CheckpointError(
            f"the checkpoint {saved.path} was made with code as {named}, which a file cannot hold: "
            f"give it again, Koi.load(path, model, {again})"
        )
    unknown = [name for name in saved.settings if name not in known]
    if unknown:
        raise CheckpointError(
            f"the checkpoint {saved.path} has settings that this Koi does not know "
            f"({', '.join(unknown)}): load it with the Koi that made it, or a newer one"
        )
    data = {name: from_data(value) for name, value in saved.settings.items() if name not in code}
    return {**data, **given}


def offer_instead_of(path: Path) -> str:
    """Return which of the files that come before ``path`` by name can be read."""
    others = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else []
    for other in sorted((other for other in others if other.name < path.name), reverse=True):
        with contextlib.suppress(CheckpointError):
            read(other)
            return f"{other} is good"
    return "none in its folder before it is good"


def go_on(
    koi: Configured,
    state: TrainingState,
    saved: Saved,
    tasks: Any = None,
    callbacks: Sequence[Any] | None = None,
) -> None:
    """Let a learner go on from a checkpoint as if it had never stopped.

    Args:
        koi: the learner.
        state: what it has come to, which is replaced.
        saved: the checkpoint.
        tasks: the task distribution, which takes its own state first, since that may fail; None:
            the next training's will take it.
        callbacks: those that have a state, likewise.

    Raises:
        CheckpointError: the model, or any setting, is another; all differences are named.
    """
    problems = [
        *held.other_model(koi, _phi(koi), saved),
        *different_settings(saved.settings, koi.settings.stored()),
        *held.other_optimizers(koi.settings, _phi(koi), saved, ()),
    ]
    _put(koi, state, saved, problems, tasks, callbacks)


def begin_with(koi: Configured, state: TrainingState, saved: Saved) -> None:
    """Let a learner that was made to go on from a checkpoint do so; settings can be others.

    Raises:
        CheckpointError: the model or an optimizer is another.
    """
    phi = _phi(koi)
    optimizers = held.other_optimizers(koi.settings, phi, saved, ("lr",))
    _put(koi, state, saved, [*held.other_model(koi, phi, saved), *optimizers])


def _put(
    koi: Configured,
    state: TrainingState,
    saved: Saved,
    problems: list[str],
    tasks: Any = None,
    callbacks: Sequence[Any] | None = None,
) -> None:
    """Put what was read into a learner, its tasks and callbacks; nothing with problems."""
    problems = problems or [*held.misfits(saved, _phi(koi), koi.settings)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(
            f"the checkpoint {saved.path} does not fit; make these as they were:\n{lines}"
        )
    settings, phi = koi.settings, _phi(koi)
    kind = saved.settings["learn_step_size"]
    phi.learned_rates = stored_rates(saved.learned_rates, kind, phi, settings)
    update = _meta_update(settings, phi, saved)
    carry = settings.inner_state == "carry"
    moments = _moments(saved, saved.moments, phi.params) if carry else None
    sources = [saved.params[name] for name in phi.names.params]
    buffers = [koi.model.get_buffer(name) for name in saved.buffers]
    if callbacks is not None:
        stateful.give_states(callbacks, saved.callbacks)
    if tasks is not None:
        stateful.give_state(tasks, saved.mark.tasks)
    with uninterrupted():
        arithmetic.copy_(phi.params, sources)
        arithmetic.copy_(buffers, list(saved.buffers.values()))
        state.iteration, state.engine = saved.iteration, saved.engine
        state.history, state.ruled_out = saved.history, set(saved.ruled_out)
        state.keep(moments, phi.params, settings)
        state.keep_rates(phi.learned_rates, phi.params, settings)
        state.update, state.begun, state.owed = update, None, saved.owed
        state.mean, state.best = _mean(saved, phi), _best(saved, phi)
        if state.scale is not None and saved.scale is not None:
            state.scale.put(saved.scale)
        state.pending, state.drawn_seed = Pending(saved.mark, saved.callbacks), saved.mark.seed


def _meta_update(settings: Settings, phi: Phi, saved: Saved) -> MetaUpdate:
    """Return a new meta-update whose optimizer has the state that was stored."""
    update = MetaUpdate(algorithm_of(settings.algorithm), phi, settings.meta_optimizer)
    optimizer, state = update.optimizer, saved.meta_state
    if optimizer is None or state is None:
        return update
    try:
        optimizer.load_state_dict(copy.deepcopy(state))
    except Exception as error:  # whatever an optimizer of the user's makes of it
        raise _no_state(saved, str(error)) from error
    # torch gives moments the type of their parameter, which need not have been theirs
    for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for param, number in zip(group["params"], stored["params"], strict=True):
            for name, value in state["state"].get(number, {}).items():
                now = optimizer.state[param].get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor):
                    optimizer.state[param][name] = value.to(now.device, copy=True)
    problem = next(held.misfits_of_state(optimizer, state["param_groups"]), None)
    if problem is not None:
        raise _no_state(saved, problem)
    return update


def _no_state(saved: Saved, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {saved.path} has a state (meta_state) that meta_optimizer does not take "
        f"({why}): give the meta_optimizer that it was made with, or an earlier checkpoint"
    )


def _mean(saved: Saved, phi: Phi) -> ExponentialMean:
    """Return the exponential mean that was stored, where φ is now."""
    of = [*phi.learned, *phi.buffers]
    count, values = saved.mean["count"], saved.mean["values"]
    if not count or not arithmetic.same_shapes(
        values, of
    ):  # as where rates are learned in another way
        return ExponentialMean()
    moved = [v.to(t.device, copy=True) for v, t in zip(values, of, strict=True)]
    return ExponentialMean(moved, count, of)


def _best(saved: Saved, phi: Phi) -> Best | None:
    """Return the best φ that was stored; its moments are where φ is now."""
    if saved.best is None:
        return None
    best, kept = Best(**saved.best), None
    if best.phi is not None:
        tensors = best.phi[: len(phi.params) + len(phi.buffers) + len(phi.constants)]
        rates = best.phi[len(tensors) :]
        if not arithmetic.same_shapes(rates, phi.learned_rates):
            rates = arithmetic.clone(phi.learned_rates)
        best = replace(best, phi=[*tensors, *rates])
    if best.moments is not None and len(best.moments) == len(saved.moment_devices):
        kept = _moments(saved, best.moments, phi.params)  # else another inner_optimizer's
    return replace(best, moments=kept)


def _moments(saved: Saved, moments: Tensors | None, params: Tensors) -> Tensors | None:
    """Return copies of moments where the parameters that they belong to are now."""
    if moments is None:
        return None
    now = {there: p.device for there, p in zip(saved.devices, params, strict=True)}
    pairs = zip(moments, saved.moment_devices, strict=True)
    return [moment.to(now.get(device, "cpu"), copy=True) for moment, device in pairs]


def _phi(koi: Configured) -> Phi:
    learned, model = koi.settings.learned(koi.model), koi.model
    buffers, constants = learned.buffers_of(model), learned.constants_of(model)
    return Phi(learned.params_of(model), buffers, constants, None, learned)


def _plain(states: States) -> tuple[Any, ...]:
    """Return the generators' states without NumPy's array, which ``torch.load`` does not trust."""
    if states.numpy is None:
        return tuple(states)
    name, key, *rest = states.numpy
    return tuple(states._replace(numpy=(name, torch.as_tensor(key), *rest)))
