"""What an engine takes for granted, collected in one place.

An engine works on a copy of the user's module and, compiled, on a graph that was traced once. Both
are right as long as nothing that they were made of changes: the settings, what the module holds
besides the values of parameters and buffers, what its classes hold, torch's own switches. `held`
and `frozen` describe that as values that are equal only where nothing has changed; every key by
which an engine or a graph is found again is made of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from koi.phi.arithmetic import unchanged
from koi.phi.learned import has_hooks

# Up to this many elements a plain tensor is compared by value: `.data` leaves no other trace.
_SMALL = 2**16
_DEEPEST = 8

# As torch has them: whoever changes a class later is heard.
_FORWARDS = {
    kind: kind.forward
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
}

# What every module has, and what recurrent layers keep beside it: their weights once more.
_OF_MODULE = frozenset({*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"})
_HOOKS = tuple(
    name for name in vars(nn.Module()) if name.endswith("hooks") and "state_dict" not in name
)
_BY_VALUE = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, range)


class Same:
    """Equal to what holds the very same object, which it keeps alive for as long."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Content:
    """A plain tensor at a moment: equal while it is the same tensor with the same values."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._values = tensor, None
        self._form: tuple[Any, ...] = form(tensor), tensor._version
        try:
            self._form += (tensor.data_ptr(),)
        except RuntimeError:  # a sparse one, or one that stands for many tasks
            return
        if tensor.numel() <= _SMALL and not tensor.is_meta:
            self._values = tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Content) or self._tensor is not other._tensor:
            return False
        if self._form != other._form or self._values is None or other._values is None:
            return self._form == other._form
        return same_values(self._values, other._values)

    def __hash__(self) -> int:
        return id(self._tensor)


def same_values(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one form hold the same values, NaN among them."""
    return torch.equal(left, right) or bool(unchanged(left, right).all())


def form(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors of one kind have in common."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def frozen(value: Any, depth: int = 0, seen: frozenset[int] = frozenset()) -> Any:
    """Return what is equal, and has the same hash, only for what computes the same.

    Numbers are told apart by type (1, 1.0 and True), containers and objects looked through,
    functions with what they close over; what cannot be looked through is equal to itself alone.

    >>> frozen(1) == frozen(1.0), frozen([1, {"a": 2.0}]) == frozen([1, {"a": 2.0}])
    (False, True)
    """
    kind = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if kind is float:
        return kind, value.hex()  # tells −0.0 from 0.0, and NaN is NaN
    if isinstance(value, nn.Parameter):  # whose values Koi sets
        return Same(value), form(value)
    if isinstance(value, Tensor):
        return Content(value)
    if depth > _DEEPEST or id(value) in seen:
        return Same(value)
    inside = functools.partial(frozen, depth=depth + 1, seen=seen | {id(value)})
    if isinstance(value, list | tuple | set | frozenset):
        return kind, tuple(map(inside, value))
    if isinstance(value, Mapping):
        return kind, tuple((inside(key), inside(part)) for key, part in list(value.items()))
    if isinstance(value, nn.Module):
        return Same(value), held(value, depth + 1, seen | {id(value)})
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return inside(value.__func__), inside(value.__self__)
    if isinstance(value, functools.partial):
        return kind, inside(value.func), inside(value.args), inside(value.keywords)
    if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
        return kind, str(value.dtype), getattr(value, "shape", ()), value.tobytes()
    if dataclasses.is_dataclass(value) or _is_plain(kind):
        own = {**_data(kind), **getattr(value, "__dict__", {})}
        return Same(value), tuple((name, inside(part)) for name, part in own.items())
    return Same(value)


def _data(kind: type) -> dict[str, Any]:
    """Return the plain numbers and words that a class and those it comes from hold."""
    return {
        name: value
        for base in reversed(kind.__mro__)
        if _is_plain(base)
        for name, value in list(vars(base).items())
        if not name.startswith("__") and type(value) in (*_BY_VALUE, float)
    }


def _is_plain(kind: type) -> bool:
    """Return whether objects of a class may be looked through: those that users write."""
    return not issubclass(kind, type | types.ModuleType) and not kind.__module__.startswith(
        ("torch.", "builtins", "numpy")
    )


def _function(function: types.FunctionType) -> Any:
    cells = function.__closure__ or ()
    given = (function.__defaults__ or (), function.__kwdefaults__ or {})
    return (
        Same(function),
        Same(function.__code__),
        tuple(_plainly(value) for value in (*_contents(cells), *given[0], *given[1].values())),
    )


def _contents(cells: Iterable[Any]) -> Iterable[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None


def _plainly(value: Any) -> Any:
    """Return a value that a function closes over, itself alone where it gathers what runs by.

    A hook that collects activations in a list would otherwise change with every forward pass.
    """
    kind = type(value)
    if kind in _BY_VALUE or kind is float:
        return frozen(value)
    if isinstance(value, list | tuple) and all(type(v) in (*_BY_VALUE, float) for v in value):
        return frozen(value)
    if isinstance(value, dict) and all(type(v) in (*_BY_VALUE, float) for v in value.values()):
        return frozen(value)
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return Same(value), Same(value.__code__)
    return Same(value)


def is_torchs_own(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether a layer computes what torch's class of it does, and may be written otherwise.

    It does not where a user has given it, or its class, another forward, as adapters do.
    """
    kind = type(module)
    return kind in kinds and "forward" not in vars(module) and kind.forward is _FORWARDS[kind]


def held(module: nn.Module, depth: int = 0, seen: frozenset[int] = frozenset()) -> tuple[Any, ...]:
    """Return what a module holds, a row for each of its parts, in the order of ``modules()``.

    That is the mode, the parameters and buffers (which tensors they are, not their values), hooks,
    and all other attributes.
    """
    parts = list(module.modules())
    seen = seen | set(map(id, parts))
    return tuple(_row(part, depth, seen) for part in parts)


def _row(part: nn.Module, depth: int, seen: frozenset[int]) -> tuple[Any, ...]:
    own = part.__dict__
    return (
        type(part),
        part.training,
        tuple(
            (name, None if tensor is None else (Same(tensor), form(tensor), has_hooks(tensor)))
            for name, tensor in (*own["_parameters"].items(), *own["_buffers"].items())
        ),
        tuple(own["_modules"]),
        tuple(frozen(hook) for name in _HOOKS if own.get(name) for hook in own[name].values()),
        tuple(
            (name, frozen(value, depth, seen))
            for name, value in own.items()
            if name not in _OF_MODULE
        ),
    )


class Look:
    """What a module holds, and a quick look whether that has changed.

    The very same objects in the same places hold what they held, unless one can change from
    inside: only then all of `held` is gathered again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = held(module)
        parts = list(module.modules())
        self._places = [
            place
            for part in parts
            for place in (part.__dict__, part._parameters, part._buffers, part._modules)
        ]
        self._hooks = [part.__dict__[name] for part in parts for name in _HOOKS]
        self._params = list(module.parameters())
        self.deep = any(map(len, self._hooks)) or any(
            _changes_inside(value)
            for part in parts
            for name, value in part.__dict__.items()
            if name not in _OF_MODULE
        )
        self._remember()

    def unchanged(self) -> bool:
        """Return whether the module holds what it held when this was made."""
        if (
            not (self.deep or any(self._hooks))
            and [*map(len, self._places)] == self._counts
            and self._forms() == self._known
        ):
            values = itertools.chain.from_iterable(map(dict.values, self._places))
            if all(map(operator.is_, values, self._objects)):
                return True
        if held(self.module) != self.held:
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        self._objects = [value for place in self._places for value in place.values()]
        self._counts, self._known = [*map(len, self._places)], self._forms()

    def _forms(self) -> list[Any]:
        # the address is another where .data or .to() has put other memory in its place
        return [(p.data_ptr(), p.requires_grad, has_hooks(p)) for p in self._params]


def _changes_inside(value: Any) -> bool:
    """Return whether an attribute may change and remain the same object."""
    if isinstance(value, tuple | frozenset):
        return any(map(_changes_inside, value))
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__)
    plain = (*_BY_VALUE, float, complex, type, types.BuiltinFunctionType, types.ModuleType)
    return not isinstance(value, plain)


def difference(module: nn.Module, before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    """Return in words the first thing in which two results of `held` for ``module`` differ."""
    if len(before) != len(after):
        return "its submodules"
    for (name, _), one, other in zip(module.named_modules(), before, after, strict=False):
        where = f" of the submodule {name!r}" if name else ""
        if one[1] != other[1]:
            return f"the mode{where}"
        for what, index in (("tensor", 2), ("attribute", 5)):
            names = [key for key, _ in set(one[index]) ^ set(other[index])]
            if names:
                return f"the {what} {names[0]!r}{where}"
        if one != other:
            return f"the hooks or submodules{where}"
    return "its submodules"


def users_classes(kinds: Iterable[type]) -> list[type]:
    """Return the classes, and those they come from, that are neither torch's, Python's nor ours."""
    every = dict.fromkeys(base for kind in dict.fromkeys(kinds) for base in kind.__mro__)
    return [k for k in every if _is_plain(k) and not k.__module__.startswith("koi.")]


def of_class(kind: type) -> tuple[Any, ...]:
    """Return what a class holds itself: its functions, and its data by value."""
    return (
        kind,
        *((name, frozen(value)) for name, value in list(vars(kind).items()) if _is_own(name)),
    )


def _is_own(name: str) -> bool:
    """Return whether a class's entry is not Python's own."""
    return not name.startswith(("__", "_abc_"))


class ValuesLook:
    """What named values are, and a quick look whether they are still the same, as `Look` is."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._objects: list[Any] | None = None
        self._frozen: tuple[Any, ...] = ()

    def now(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values `frozen`, with their names; the same object while nothing changes."""
        names, objects = tuple(values), list(values.values())
        known = self._objects is not None and names == self._names
        if not (known and _identical(self._objects or [], objects)):
            self._frozen = tuple((name, frozen(value)) for name, value in values.items())
            self._names = names
            self._objects = None if any(map(_changes_inside, objects)) else objects
        return self._frozen


class ClassLook:
    """What users' classes hold, and a quick look whether that has changed, as `Look` is."""

    def __init__(self, kinds: Iterable[type]) -> None:
        self._classes = users_classes(kinds)
        self._known: dict[Any, Same] = {}
        self._token, self._objects = self._look()

    def now(self) -> Same:
        """Return what stands for all that the classes hold now, the same whenever that is."""
        if self._objects is None or not _identical(self._objects, self._parts()):
            self._token, self._objects = self._look()
        return self._token

    def _look(self) -> tuple[Same, list[Any] | None]:
        content = tuple(map(of_class, self._classes))
        token = self._known.setdefault(content, Same(object()))
        parts = self._parts()
        deep = any(
            isinstance(part, list | dict | set | Tensor | functools.partial) for part in parts
        )
        return token, None if deep else parts

    def _parts(self) -> list[Any]:
        """Return the very objects that the classes and their functions hold."""
        values = [v for kind in self._classes for n, v in vars(kind).items() if _is_own(n)]
        functions = [value for value in values if isinstance(value, types.FunctionType)]
        for function in functions:
            values += (function.__code__, *(function.__defaults__ or ()))
            values += (function.__kwdefaults__ or {}).values()
            values += _contents(function.__closure__ or ())
        return values


def _identical(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def environment() -> tuple[Any, ...]:
    """Return torch's own switches, which a graph takes in when it is traced."""
    cudnn = torch.backends.cudnn
    on_cuda = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,  # the default one, whose own question takes longer
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        on_cuda if torch.cuda.is_initialized() else (),
    )
