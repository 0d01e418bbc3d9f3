"""The copy of the user's module on which inner steps are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koi.errors import EngineError, ModelError
from koi.inner.checks.granted import Look, difference, form, held
from koi.phi import arithmetic, learned
from koi.phi.arithmetic import Tensors
from koi.phi.learned import Learned
from koi.phi.outcome import Phi


class Slot(NamedTuple):
    """Where a module keeps a tensor: a dictionary of one of its parts, and the key there."""

    place: dict[str, Any]
    key: str
    tensor: Tensor
    address: int


class WorkingCopy:
    """A copy of the user's module that every task finds as the module itself is.

    Adapted parameters and buffers are tensors of its own, the same from task to task, which `begin`
    sets to φ. Other parameters are the user's own: they are never copied and never out of date, and
    a loss that changes one is refused. Whatever else a task leaves behind (a hidden state in an
    attribute, a mode) makes the next one begin with a fresh copy.

    Args:
        model: the user's module.
        learned: what of it a task adapts.
        share: whether parameters that are learned and not adapted are shared, too; a copy that is
            given away has its own.
        prepare: what is done to every fresh copy, such as writing a layer in another form.
    """

    def __init__(
        self,
        model: nn.Module,
        learned: Learned,
        *,
        share: bool = True,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._model, self.learned, self._prepare = model, learned, prepare
        self._frozen = learned.others_of(model)
        if share:
            adapted = set(learned.those_adapted(learned.params))
            constant = [name for name in learned.params if name not in adapted]
            self._frozen |= {name: model.get_parameter(name) for name in constant}
        self._versions: list[int] = []
        self.module = self._copy({id(p): p for p in self._frozen.values()})
        self.params = learned.params_of(self.module)
        pairs = zip(learned.params, self.params, strict=True)
        self._own_places = [i for i, (name, _) in enumerate(pairs) if name not in self._frozen]
        self.values = [self.params[i].detach() for i in self._own_places]  # without autograd
        self._own = learned.tensors_of(self.module)
        self._made()

    def begin(self, phi: Phi) -> None:
        """Set the copy to φ and to what the user's module holds besides."""
        self._put_buffers_back()
        if not self._look.unchanged():
            theirs = self.learned.tensors_of(self._model)
            shared: dict[int, Tensor] = {id(p): p for p in self._frozen.values()}
            shared |= {id(t): own for t, own in zip(theirs, self._own, strict=True)}
            self.module = self._copy(shared)
            self._made()
        arithmetic.copy_(self.values, [phi.params[i] for i in self._own_places])
        count = len(self.params)
        arithmetic.copy_(self._own[count:], [*phi.buffers, *phi.constants])
        self.watch()

    def watch(self) -> None:
        """Remember how often each frozen parameter has been changed so far, for `check`."""
        self._versions = [p._version for p in self._frozen.values()]

    def end(self) -> tuple[Tensors, Tensors]:
        """Return the buffers and constants that the task left.

        Raises:
            ModelError: the task changed what Koi can neither average nor undo.
        """
        self.check()
        after = self.learned.buffers_of(self.module), self.learned.constants_of(self.module)
        for name, own, tensor in zip(
            (*self.learned.buffers, *self.learned.constants),
            self._own[len(self.params) :],
            (*after[0], *after[1]),
            strict=True,
        ):
            if form(own)[:3] != form(tensor)[:3]:
                before, now = arithmetic.in_words(own), arithmetic.in_words(tensor)
                raise ModelError(
                    f"a task turned the buffer {name!r} of {before} into one of {now}, and buffers "
                    "are averaged over tasks: run one batch through the model before giving it to "
                    "Koi, or keep what grows in a plain attribute"
                )
        return after

    def check(self) -> None:
        """Check that the parameters are still those that are stepped, and the frozen ones as were.

        Raises:
            ModelError: naming the parameter.
        """
        for name, slot in zip(self.learned.params, self._params, strict=True):
            own = slot.place.get(slot.key)
            if own is not slot.tensor or own.data_ptr() != slot.address:
                raise ModelError(
                    f"the parameter {name!r} is replaced in forward or in the loss, so that the "
                    "inner optimizer steps another tensor: change it in place, by copy_() under "
                    "torch.no_grad()"
                )
        now = [p._version for p in self._frozen.values()]
        for name, before, after in zip(self._frozen, self._versions, now, strict=True):
            if before != after:
                raise ModelError(
                    f"the loss changes the frozen parameter {name!r} in place, which all tasks "
                    "share: make it a buffer, which every task begins anew"
                )

    def untouched(self) -> None:
        """Check that nothing but parameters and buffers has changed since the copy was made.

        Raises:
            EngineError: naming what has.
        """
        self.check()
        self._put_buffers_back()
        if not self._look.unchanged():
            what = difference(self.module, self._look.held, held(self.module))
            raise EngineError(
                f"{what} is changed in forward or in the loss, which only one task at a time can "
                "keep to itself: register it as a buffer, or use vectorize=False, compile=False"
            )

    @property
    def as_it_began(self) -> bool:
        """Whether all but the values of parameters and buffers is as when the copy was made."""
        return self._look.unchanged()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo what a loss that is no inner step does: to buffers, modes and other attributes.

        Raises:
            ModelError: it changed something inside of an attribute, which cannot be undone.
        """
        before = held(self.module) if self._look.deep else ()
        dictionaries = [
            (own, dict(own))
            for part in self.module.modules()
            for own in (part.__dict__, part._buffers, part._parameters)
        ]
        tensors = self.learned.tensors_of(self.module)[len(self.params) :]
        values = arithmetic.clone(tensors)
        yield
        for own, entries in dictionaries:
            own.clear()
            own.update(entries)
        arithmetic.copy_(tensors, values)
        after = held(self.module) if self._look.deep else ()
        if before != after:
            raise ModelError(
                f"the query loss changes {difference(self.module, before, after)} from inside, "
                "which Koi cannot undo before the next inner step: let it assign a new value"
            )

    def _put_buffers_back(self) -> None:
        for slot in self._buffers:  # where forward has assigned another
            slot.place[slot.key] = slot.tensor

    def _copy(self, shared: dict[int, Tensor]) -> nn.Module:
        """Return a fresh copy of the module, with ``shared`` in the place of tensors, by id."""
        module = learned.copy_module(self._model, shared)
        for kind in ("_parameters", "_buffers"):  # where a __deepcopy__ did not hand the memo on
            for part, theirs in zip(module.modules(), self._model.modules(), strict=True):
                for key, tensor in getattr(theirs, kind).items():
                    if id(tensor) in shared:
                        getattr(part, kind)[key] = shared[id(tensor)]
        return module

    def _made(self) -> None:
        """Remember where the tensors are and what else the copy holds."""
        module, learned = self.module, self.learned
        if self._prepare is not None:
            self._prepare(module)
        self._params = [_slot(module, name, "_parameters") for name in learned.params]
        names = (*learned.buffers, *learned.constants)
        self._buffers = [_slot(module, name, "_buffers") for name in names]
        self._look = Look(module)


def _slot(module: nn.Module, name: str, kind: str) -> Slot:
    path, _, key = name.rpartition(".")
    place = getattr(module.get_submodule(path), kind)
    address = place[key].data_ptr() if place[key].layout is torch.strided else 0
    return Slot(place, key, place[key], address)
