"""What a checkpoint holds, and how training goes on from it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from koi import randomness, storage
from koi.algorithms import Algorithm, algorithm_of
from koi.configuration import inner_factory
from koi.errors import CheckpointError, annotate
from koi.inner.optimizers.rules import OptimizerFactory, make_optimizer
from koi.inner.scaling import LossScale
from koi.phi import parameters
from koi.phi.outcome import Phi
from koi.phi.parameters import Learned, Tensors
from koi.phi.update import MetaOptimizerFactory, MetaUpdate
from koi.randomness import States
from koi.records import Record
from koi.settings import STORED
from koi.training import frozen, stateful
from koi.training.agreement import (
    arguments_of,
    as_data,
    different_optimizer,
    different_settings,
    different_tensors,
    from_data,
    is_kind,
    tensors_of,
)
from koi.training.interrupts import Interrupts

Data = dict[str, Any]

_VERSION = version("koi-x")


class Mark(NamedTuple):
    """Where the next meta-iteration draws from: what the seed does not determine.

    Args:
        tasks: a copy of the task distribution's ``state_dict()``; None where it has none.
        generators: the states of the global generators; None with a seed.
        seed: what several ranks that were given no seed draw from, or drew from before.
    """

    tasks: Any
    generators: States | None
    seed: int | None = None


@dataclass(frozen=True)
class Pending:
    """What `koi.Koi.load` has read and only the next training can use."""

    mark: Mark
    ruled_out: frozenset[str]
    callbacks: list[Any] | None


class Learner(Protocol):
    """What a checkpoint needs of `koi.Koi`."""

    model: nn.Module
    step_size: float
    inner_optimizer: str | OptimizerFactory
    inner_state: str
    meta_optimizer: MetaOptimizerFactory | None
    algorithm: str | Algorithm
    seed: int | None
    iteration: int
    history: list[Record]
    engine: str
    _moments: Tensors | None
    _moments_of: Tensors
    _update: MetaUpdate | None
    _interrupts: Interrupts
    _tasks: Any
    _callbacks: tuple[Any, ...]
    _pending: Pending | None
    _ruled_out: set[str]
    _drawn_seed: int | None
    _scale: LossScale | None


AnyLearner = TypeVar("AnyLearner", bound=Learner)


def mark(koi: Learner) -> Mark:
    """Return where the next meta-iteration of ``koi`` draws from."""
    if koi._pending is not None:
        return koi._pending.mark
    tasks = koi._tasks.state_dict() if hasattr(koi._tasks, "state_dict") else None
    generators = randomness.capture() if koi.seed is None else None
    return Mark(copy.deepcopy(tasks), generators, koi._drawn_seed)


def contents(koi: Learner, at: Mark) -> Data:
    """Return everything that training needs to go on.

    Args:
        koi: the learner between two meta-iterations.
        at: where its next meta-iteration draws from.
    """
    learned = Learned.of(koi.model)
    params, moments = learned.params_of(koi.model), koi._moments
    names = (*learned.buffers, *learned.constants)
    meta = None if koi._update is None else koi._update.optimizer
    callbacks: list[Any] | None
    if koi._pending is None:
        ruled_out, callbacks = koi._ruled_out, [owner.state_dict() for owner in koi._callbacks]
    else:
        ruled_out, callbacks = set(koi._pending.ruled_out), koi._pending.callbacks
    return {
        "koi": _VERSION,
        "torch": torch.__version__,
        "settings": _settings(koi),
        "iteration": koi.iteration,
        "engine": koi.engine,
        "ruled_out": sorted(ruled_out),
        "history": {
            column.name: _column([getattr(record, column.name) for record in koi.history])
            for column in fields(Record)
        },
        "params": dict(zip(learned.params, params, strict=True)),
        "buffers": {name: koi.model.get_buffer(name) for name in names},
        "tensors": tensors_of(koi.model),
        "frozen": frozen.digests(koi.model),
        "devices": [str(p.device) for p in params],
        "moments": moments,
        "moment_devices": [str(m.device) for m in moments or []],
        "scale": None if koi._scale is None else koi._scale.state(),
        "inner_optimizer": _inner_description(koi),
        "meta_optimizer": None if meta is None else arguments_of(meta),
        "meta_state": None if meta is None else meta.state_dict(),
        "tasks": at.tasks,
        "callbacks": callbacks,
        "generators": None if at.generators is None else tuple(at.generators),
        "drawn_seed": at.seed,
    }


def save(koi: Learner, path: Path, at: Mark | None = None) -> None:
    """Write a checkpoint, Ctrl-C held back.

    Raises:
        CheckpointError: it cannot be written.
    """
    storage.write(path, contents(koi, mark(koi) if at is None else at))


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read; the fields are what `contents` gives."""

    path: Path | str
    settings: Data
    iteration: int
    engine: str
    ruled_out: frozenset[str]
    history: list[Record]
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
    callbacks: list[Any] | None = None

    def code(self) -> dict[str, str]:
        """Return the names of settings that were code, and what code it was."""
        return {name: value[1] for name, value in self.settings.items() if is_kind(value, "code")}


def read(path: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, of another program or of a newer Koi.
    """
    return saved_from(storage.read(path), path)


def saved_from(data: Data, path: Path | str) -> Saved:
    """Return what `contents` gave; ``path`` is what errors name.

    Raises:
        CheckpointError: something is missing.
    """
    try:
        names = [known.name for known in fields(Saved)]
        kept = {name: data[name] for name in names if name in data}
        generators = data["generators"]
        states = None if generators is None else States(*generators)
        kept["settings"] = {name: data["settings"][name] for name in STORED}
        kept["ruled_out"] = frozenset(data["ruled_out"])
        kept["history"] = _records(data["history"])
        return Saved(path=path, mark=Mark(data["tasks"], states, data["drawn_seed"]), **kept)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is not whole ({type(error).__name__}: {error}): use an "
            "earlier one"
        ) from error


def load(kind: Callable[..., AnyLearner], path: Path, model: nn.Module, given: Data) -> AnyLearner:
    """Return a learner that goes on from ``path``.

    Args:
        kind: `koi.Koi`.
        path: a checkpoint.
        model: takes φ, once all has been checked.
        given: settings that replace those in the file, or that a file cannot hold.

    Raises:
        CheckpointError: the file cannot be read, does not fit, or lacks settings that are code.
    """
    try:
        saved = read(path)
    except CheckpointError as error:
        annotate(error, offer_instead_of(path))
        raise
    code = saved.code()
    missing = [name for name in code if name not in given]
    if missing:
        named = " and ".join(f"{name} ({code[name]})" for name in missing)
        again = ", ".join(f"{name}=…" for name in missing)
        raise CheckpointError(
            f"the checkpoint {path} was made with code as {named}, which a file cannot hold: give "
            f"it again, Koi.load(path, model, {again})"
        )
    data = {name: from_data(value) for name, value in saved.settings.items() if name not in code}
    koi = kind(model, **{**data, **given})
    problems = [*_model_problems(koi, saved), *_optimizer_problems(koi, saved, ("lr",))]
    put(koi, saved, problems)
    return koi


def offer_instead_of(path: Path) -> str:
    """Return which of the files that come before ``path`` by name can be read."""
    others = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else []
    for other in sorted((other for other in others if other.name < path.name), reverse=True):
        with contextlib.suppress(CheckpointError):
            read(other)
            return f"{other} is good"
    return "none in its folder before it is good"


def go_on(koi: Learner, saved: Saved, tasks: Any, callbacks: Sequence[Any]) -> None:
    """Let ``koi`` go on from a checkpoint as if it had never stopped.

    Args:
        koi: the learner.
        saved: the checkpoint.
        tasks: the task distribution, which takes its own state first, since that may fail.
        callbacks: those that have a state; they take theirs first as well.

    Raises:
        CheckpointError: the model, or any setting, is another; all differences are named.
    """
    problems = [
        *_model_problems(koi, saved),
        *different_settings(saved.settings, _settings(koi)),
        *_optimizer_problems(koi, saved, ()),
    ]
    put(koi, saved, problems, tasks, callbacks)


def put(
    koi: Learner,
    saved: Saved,
    problems: list[str],
    tasks: Any = None,
    callbacks: Sequence[Any] | None = None,
) -> None:
    """Put what was read into ``koi``, its model, tasks and callbacks; nothing with problems."""
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(
            f"the checkpoint {saved.path} does not fit; make these as they were:\n{lines}"
        )
    phi = _phi(koi)
    update = _meta_update(koi, phi, saved)
    moments = _moments(saved, phi.params) if koi.inner_state == "carry" else None
    sources = [saved.params[name] for name in Learned.of(koi.model).params]
    buffers = [koi.model.get_buffer(name) for name in saved.buffers]
    if callbacks is not None:
        stateful.give_states(callbacks, saved.callbacks)
    if tasks is not None:
        stateful.give_state(tasks, saved.mark.tasks)
    with koi._interrupts, koi._interrupts.held():
        parameters.copy_(phi.params, sources)
        parameters.copy_(buffers, list(saved.buffers.values()))
        koi.iteration, koi.engine = saved.iteration, saved.engine
        koi.history, koi._moments, koi._update = list(saved.history), moments, update
        koi._moments_of = phi.params
        if koi._scale is not None and saved.scale is not None:
            koi._scale.put(saved.scale)
        koi._pending = Pending(saved.mark, saved.ruled_out, saved.callbacks)
        koi._drawn_seed = saved.mark.seed


def _model_problems(koi: Learner, saved: Saved) -> list[str]:
    """Return what differs in form, or, where nothing does, which frozen parameters do in value."""
    problems = [*different_tensors(saved.tensors, tensors_of(koi.model))]
    return problems or [*frozen.different_frozen(saved.frozen, koi.model)]


def _optimizer_problems(koi: Learner, saved: Saved, free: tuple[str, ...]) -> Iterator[str]:
    """Yield what differs in the optimizers whose state is carried on, but for ``free``."""
    if saved.moments and koi.inner_state == "carry":
        here = _inner_description(koi)
        yield from different_optimizer("inner_optimizer", saved.inner_optimizer, here, free)
    meta = MetaUpdate(algorithm_of(koi.algorithm), _phi(koi), koi.meta_optimizer).optimizer
    if saved.meta_optimizer is not None and meta is not None:
        here = arguments_of(meta)
        yield from different_optimizer("meta_optimizer", saved.meta_optimizer, here)


def _settings(koi: Learner) -> Data:
    return {name: as_data(getattr(koi, name)) for name in STORED}


def _inner_description(koi: Learner) -> Data:
    params = Learned.of(koi.model).params_of(koi.model)
    return arguments_of(make_optimizer(inner_factory(koi.inner_optimizer), params, koi.step_size))


def _meta_update(koi: Learner, phi: Phi, saved: Saved) -> MetaUpdate:
    """Return a new meta-update whose optimizer has the state that was stored."""
    update = MetaUpdate(algorithm_of(koi.algorithm), phi, koi.meta_optimizer)
    optimizer, state = update.optimizer, saved.meta_state
    if optimizer is None or state is None:
        return update
    try:
        optimizer.load_state_dict(copy.deepcopy(state))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {saved.path} has a state that meta_optimizer does not take ({error}): "
            "give the meta_optimizer that it was made with"
        ) from error
    # torch gives moments the type of their parameter, which need not have been theirs
    for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for param, number in zip(group["params"], stored["params"], strict=True):
            for name, value in state["state"].get(number, {}).items():
                now = optimizer.state[param].get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor):
                    optimizer.state[param][name] = value.to(now.device)
    return update


def _moments(saved: Saved, params: Tensors) -> Tensors | None:
    """Return the moments on the devices that now hold the parameters they belong to."""
    if saved.moments is None:
        return None
    now = {there: p.device for there, p in zip(saved.devices, params, strict=True)}
    pairs = zip(saved.moments, saved.moment_devices, strict=True)
    return [moment.to(now.get(device, "cpu")) for moment, device in pairs]


def _phi(koi: Learner) -> Phi:
    learned, model = Learned.of(koi.model), koi.model
    buffers, constants = learned.buffers_of(model), learned.constants_of(model)
    return Phi(learned.params_of(model), buffers, constants, None, learned)


def _column(values: list[Any]) -> Tensor:
    kind = torch.int64 if all(isinstance(value, int) for value in values) else torch.float64
    return torch.tensor(values, dtype=kind)


def _records(columns: Mapping[str, Tensor]) -> list[Record]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [Record(**dict(zip(columns, row, strict=True))) for row in rows]
