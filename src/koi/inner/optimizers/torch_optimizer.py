"""Any ``torch.optim`` optimizer, which steps as itself, with its moments as a list.

For every task the user's factory makes a new one, as one would write it by hand, so that nothing
that the optimizer or what hangs on it (hooks, schedulers) has changed reaches the next task, except
the moments. These are what it keeps of each parameter, what it changes in its parameter groups
(such as Prodigy's estimate d), apart from what schedulers set there, and what it keeps in its state
under a name (such as MADGRAD's k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koi.errors import ConfigurationError, EngineError
from koi.inner.base import InnerLoop
from koi.inner.optimizers.hooks import hooks_set_aside
from koi.inner.optimizers.moments import check_moments, spread
from koi.inner.optimizers.rules import layout_of, make_optimizer
from koi.phi.arithmetic import Tensors
from koi.phi.rates import StepRates, scaled_rates
from koi.randomness import capture, restore

# Set by schedulers as a task goes on: each task begins with what the factory gives.
_SCHEDULED = ("params", "lr", "momentum", "betas")

# A parameter, by its place, or after all of them a parameter group, or after these the optimizer's
# whole state; and a name there.
Key = tuple[int, str]


class Slot(NamedTuple):
    """Where one moment stands in an optimizer, and how it looks there."""

    key: Key
    per_task: bool
    zero: Any


class TorchOptimizer:
    """A ``torch.optim`` optimizer bound to tensors that stay the same.

    Its moments are tensors; then a vector of all that it keeps as Python's numbers; then a vector
    of flags, one for each of both: whether the optimizer keeps it yet (of a parameter that no step
    has used it keeps nothing), or has changed it.

    Args:
        inner: the settings.
        params: the tensors to step.
        num_tasks: rows of the stacked tensors; None: the tensors are one task's.

    Raises:
        ConfigurationError: it cannot step, or keeps what cannot be averaged over tasks.
    """

    _optimizer: torch.optim.Optimizer

    def __init__(self, inner: InnerLoop, params: Tensors, num_tasks: int | None = None) -> None:
        self.params = params
        self._inner = inner
        self._num_tasks = num_tasks
        slots = self._learn_slots()
        self._tensors = [slot for slot in slots if isinstance(slot.zero, Tensor)]
        self._numbers = [slot for slot in slots if not isinstance(slot.zero, Tensor)]
        self._forms = {slot.key: _form(slot.zero) for slot in slots}
        self._shapes = [t.zero.shape[1:] if t.per_task else t.zero.shape for t in self._tensors]
        self._shapes += [torch.Size([len(self._numbers)]), torch.Size([len(slots)])]

    def load(self, moments: Tensors | None) -> None:
        """Start with a new optimizer, and copies of φ's moments.

        Raises:
            ConfigurationError: they are another optimizer's, or of other parameters.
        """
        self._optimizer = new_optimizer(self._inner, self.params, self._num_tasks)
        kept = contents(self._optimizer, self.params)
        self._at_first = {key: _copy(v) for key, v in kept.items() if key[0] >= len(self.params)}
        self._others = other_entries(self._optimizer)
        if moments is None:
            return
        check_moments(moments, self._shapes)
        *tensors, numbers, flags = spread(moments, self.per_task(moments), self._num_tasks)
        slots, values = [*self._tensors, *self._numbers], [*tensors, *numbers.tolist()]
        for slot, value, flag in zip(slots, values, flags.tolist(), strict=True):
            if flag > 0:
                self._put(slot, value)

    def step(self, grads: Sequence[Tensor | None], rates: StepRates = None) -> None:
        """Step by the gradients; the rates of all that adapt are the same, of others 0."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        factor = rates.max().item() if isinstance(rates, Tensor) else 1.0
        with scaled_rates(self._optimizer, factor):
            self._optimizer.step()
        for param in self.params:
            param.grad = None

    def moments(self) -> Tensors:
        """Return copies of the moments, zero for parameters that no step has used yet.

        Raises:
            ConfigurationError: the optimizer has changed what cannot be carried from task to task.
        """
        found = contents(self._optimizer, self.params)
        self._refuse_unknown(found)
        flags = [
            float(key in found and not _same(self._at_first.get(key), found[key]))
            for key, _, _ in [*self._tensors, *self._numbers]
        ]
        numbers = [found.get(slot.key, slot.zero) for slot in self._numbers]
        return [
            *(_copy(found.get(slot.key, slot.zero)) for slot in self._tensors),
            torch.tensor(numbers, dtype=torch.float64),
            torch.tensor(flags, dtype=torch.float64),
        ]

    def per_task(self, moments: Tensors) -> list[bool]:
        """Return true for those in the shape of the stacked parameters."""
        flags = [slot.per_task for slot in self._tensors]
        return flags + [False] * (len(moments) - len(flags))

    def _learn_slots(self) -> list[Slot]:
        """Learn what the optimizer will keep, by steps of another one on copies."""
        copies = [p.detach().clone().requires_grad_() for p in self.params]
        optimizer = new_optimizer(self._inner, copies, self._num_tasks)
        for _ in range(2):  # some is kept from the second step on
            try_step(optimizer, copies, [torch.ones_like(p) for p in copies])
        slots = []
        for key, value in contents(optimizer, copies).items():
            if not isinstance(value, Tensor):
                slots.append(Slot(key, False, type(value)(0)))
                continue
            if value.numel() > 1 and not (value.is_floating_point() or value.is_complex()):
                raise cannot_carry(optimizer, key[1], f"a tensor of {value.dtype}")
            stacked = self._num_tasks is not None and key[0] < len(copies)
            per_task = stacked and value.shape == copies[key[0]].shape
            slots.append(Slot(key, per_task, torch.zeros_like(value)))
        return slots

    def _put(self, slot: Slot, value: Any) -> None:
        (owner, name), kind = slot.key, type(slot.zero)
        if isinstance(slot.zero, Tensor):
            value = value.clone()
        elif value.is_integer():  # else the mean of a count that differs between tasks
            value = kind(value)
        if owner < len(self.params):
            self._optimizer.state[self.params[owner]][name] = value
        else:
            _shared_by_all(self._optimizer)[owner - len(self.params)][name] = value

    def _refuse_unknown(self, found: dict[Key, Any]) -> None:
        for key, value in found.items():
            if key not in self._forms or self._forms[key] != _form(value):
                what = f"{_kind(value)} that comes, grows or becomes another in later steps"
                raise cannot_carry(self._optimizer, key[1], what)
        others = other_entries(self._optimizer)
        changed = [key[1] for key, value in others.items() if self._others.get(key) != value]
        if changed:
            what = "an entry of its parameter group that is neither a number nor a tensor"
            raise cannot_carry(self._optimizer, changed[0], what)


def new_optimizer(
    inner: InnerLoop, params: Tensors, num_tasks: int | None
) -> torch.optim.Optimizer:
    """Call the user's factory with tensors in the place of the model's parameters.

    Raises:
        ConfigurationError: it treats these otherwise than the model's own.
        EngineError: it treats stacked ones otherwise, since these have a dimension more.
    """
    optimizer = make_optimizer(inner.factory, params, inner.step_size)
    if inner.layout is None:
        return optimizer
    layout = layout_of(optimizer, params)
    if num_tasks is not None and layout != inner.layout:
        raise EngineError(
            "inner_optimizer treats parameters by their shapes (or gives other settings at every "
            "call), and the stacked parameters of many tasks have a dimension more: let it choose "
            "them by their places among those it is given, or use vectorize=False"
        )
    if [group.places for group in layout] != [group.places for group in inner.layout]:
        raise ConfigurationError(
            [
                "inner_optimizer takes or groups the parameters of a copy of the model otherwise "
                "than the model's own: let it choose them by their places or shapes among those it "
                "is given, as in params[-2:], not by comparing them with the model's"
            ]
        )
    return optimizer


def try_step(optimizer: torch.optim.Optimizer, params: Tensors, grads: Tensors) -> None:
    """Step by the gradients, without hooks and what else was put around the step, nor draws.

    Raises:
        ConfigurationError: the step fails.
    """
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    states = capture()
    try:
        with hooks_set_aside(optimizer):
            type(optimizer).step(optimizer)
    except Exception as error:
        raise ConfigurationError(
            [
                f"inner_optimizer gave {type(optimizer).__name__}, which cannot step the model's "
                f"parameters ({type(error).__name__}: {error}): change its settings, or choose "
                "another one"
            ]
        ) from error
    finally:
        restore(states)


def contents(optimizer: torch.optim.Optimizer, params: Tensors) -> dict[Key, Any]:
    """Return the tensors and numbers that an optimizer keeps of parameters, and in its groups.

    Raises:
        ConfigurationError: it keeps something else of a parameter, or a state of no parameter.
    """
    found: dict[Key, Any] = {}
    for owner, param in enumerate(params):
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if value is None:
                continue
            if not _is_number(value):
                raise cannot_carry(optimizer, name, _kind(value))
            found[owner, name] = value
    own = {id(param) for param in params}
    for key, value in optimizer.state.items():
        if id(key) not in own and not (isinstance(key, str) and _is_number(value)):
            name = key if isinstance(key, str) else _kind(key)
            raise cannot_carry(optimizer, name, f"{_kind(value)} of no parameter")
    for owner, entries in enumerate(_shared_by_all(optimizer), start=len(params)):
        for name, value in entries.items():
            if isinstance(name, str) and name not in _SCHEDULED and _is_number(value):
                found[owner, name] = value
    return found


def _shared_by_all(optimizer: torch.optim.Optimizer) -> list[dict[Any, Any]]:
    """Return where an optimizer keeps what is of no single parameter."""
    return [*optimizer.param_groups, optimizer.state]


def other_entries(optimizer: torch.optim.Optimizer) -> dict[Key, str]:
    """Return as text what is in the groups besides tensors and numbers."""
    return {
        (number, name): repr(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in _SCHEDULED and not _is_number(value)
    }


def cannot_carry(optimizer: torch.optim.Optimizer, name: str, what: str) -> ConfigurationError:
    """Return the error that says what an optimizer keeps that no task can go on from."""
    return ConfigurationError(
        [
            f"inner_optimizer gave {type(optimizer).__name__}, which keeps {what} ({name!r}) "
            "between steps: Koi can carry from task to task, and average, numbers and floating-"
            "point tensors that are there from the first steps on; choose another optimizer"
        ]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor | bool | int | float)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _form(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
