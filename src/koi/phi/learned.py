"""Which tensors of a module a task adapts, and whether a copy can stand for the module."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from koi.errors import ModelError
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors, copy_
from koi.phi.roles import Names, chosen
from koi.phi.shards import Shards, local

Item = TypeVar("Item")


@dataclass(frozen=True)
class Learned:
    """The names of what moves: parameters by gradient, buffers by use.

    Parameters count once however many names they are tied to; those that are neither adapted nor
    learned are left out. Floating and complex buffers move by ε as the parameters do; `constants`
    are the others, such as a counter or a flag, which become what the last task of a meta-batch
    leaves.

    Args:
        params: of the parameters that the inner loop or the meta-update moves.
        buffers: of the floating and complex buffers.
        constants: of the other buffers.
        adapted: the places in ``params`` of those that the inner loop moves; None: all.
        learned: the places of those that the meta-update moves; None: all.
        shards: the ranks over which the parameters are sharded; None: all of them are here.
    """

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    adapted: tuple[int, ...] | None = None
    learned: tuple[int, ...] | None = None
    shards: Shards | None = None

    @classmethod
    def of(cls, module: nn.Module, adapts: Names = None, learns: Names = None) -> Learned:
        """Read the names off ``module``.

        Args:
            module: the user's module.
            adapts: which parameters the inner loop moves, as `koi.phi.roles.chosen` takes them.
            learns: which the meta-update moves.

        Raises:
            ConfigurationError: ``adapts`` or ``learns`` chooses nothing.
            ModelError: no parameter can learn, lazy ones have no shape yet, they are sharded
                otherwise than by ``fully_shard``, or a copy would not do what the module does
                (`check_plain`).
        """
        shards = Shards.of(module)
        named = dict(module.named_parameters())
        everything = (*named.items(), *module.named_buffers())
        lazy = [name for name, tensor in everything if is_lazy(tensor)]
        if lazy:
            raise ModelError(
                f"the model has lazy parameters or buffers without a shape ({', '.join(lazy)}): "
                "run one batch through it before giving it to Koi"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ModelError(
                "the model is wrapped, and Koi shares out tasks to processes by itself: give it "
                "the plain module, on one device of each, and start the script by torchrun"
            )
        check_plain(module)
        if not any(p.requires_grad for p in named.values()):
            raise ModelError(
                f"the model has no parameter that can learn ({len(named)} parameters, none with "
                "requires_grad): give it at least one, or unfreeze some"
            )
        moves = {
            name: buffer.is_floating_point() or buffer.is_complex()
            for name, buffer in module.named_buffers()
        }
        inner, outer = chosen(module, adapts, "adapts"), chosen(module, learns, "learns")
        params = tuple(name for name in named if name in {*inner, *outer})
        return cls(
            params,
            tuple(name for name in moves if moves[name]),
            tuple(name for name in moves if not moves[name]),
            None if inner == params else tuple(map(params.index, inner)),
            None if outer == params else tuple(map(params.index, outer)),
            shards,
        )

    def those_adapted(self, each: Sequence[Item]) -> list[Item]:
        """Return, of one item for each of ``params``, those of what the inner loop moves."""
        return list(each) if self.adapted is None else [each[i] for i in self.adapted]

    def those_learned(self, each: Sequence[Item]) -> list[Item]:
        """Return, of one item for each of ``params``, those of what the meta-update moves."""
        return list(each) if self.learned is None else [each[i] for i in self.learned]

    def others_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that nothing moves, by name."""
        return {n: p for n, p in module.named_parameters() if n not in self.params}

    def params_of(self, module: nn.Module) -> Tensors:
        """Return the learned parameters of ``module``, not copies, in this order.

        Of sharded ones these are the rows that are here.
        """
        return [local(module.get_parameter(name)) for name in self.params]

    def buffers_of(self, module: nn.Module) -> Tensors:
        """Return the adapted buffers of ``module``, not copies, in this order."""
        return [module.get_buffer(name) for name in self.buffers]

    def constants_of(self, module: nn.Module) -> Tensors:
        """Return the integer buffers of ``module``, not copies, in this order."""
        return [module.get_buffer(name) for name in self.constants]

    def tensors_of(self, module: nn.Module) -> Tensors:
        """Return parameters, buffers and constants of ``module``, not copies, in this order."""
        return [*self.params_of(module), *self.buffers_of(module), *self.constants_of(module)]

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Return the Euclidean norm of tensors like the parameters, wherever their rows are."""
        here = arithmetic.norm(tensors)
        if self.shards is None:
            return here.item()
        return math.sqrt(self.shards.total(here.double().square()).item())

    def put(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        """Overwrite parameters, buffers and constants of ``module``, given in this order."""
        copy_([t.detach() for t in self.tensors_of(module)], tensors)


def check_plain(module: nn.Module) -> None:
    """Check that other tensors can take the place of the module's own without a loss.

    Raises:
        ModelError: it is scripted, was made in inference mode, or has hooks on parameters.
    """
    scripted = [n for n, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        part = f"its part {scripted[0]!r}" if scripted[0] else "it"
        raise ModelError(
            f"the model cannot be adapted, as {part} is a torch.jit.ScriptModule, in which no "
            "other weights can be put for each task: give the plain module, before it was scripted "
            "or traced (compile=True makes it fast)"
        )
    params = dict(module.named_parameters())
    tensors = (*params.items(), *module.named_buffers())
    inference = [name for name, tensor in tensors if tensor.is_inference()]
    if inference:
        raise ModelError(
            f"the model has tensors made under torch.inference_mode() ({_named(inference)}), which "
            "nothing can learn or change later: make or load it outside, or under torch.no_grad()"
        )
    hooked = [name for name, p in params.items() if p.requires_grad and has_hooks(p)]
    if hooked:
        raise ModelError(
            f"the model has hooks on its parameters ({_named(hooked)}), which the copies that "
            "tasks adapt do not have: change the gradient in an inner_optimizer of your own, or "
            "mask the parameter in forward"
        )


def has_hooks(tensor: Tensor) -> bool:
    """Return whether a tensor calls something of the user's when it gets a gradient."""
    # both are None, or dictionaries that are empty again once the hooks are removed
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _named(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def copy_module(module: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of ``module`` to work on.

    Args:
        module: the user's module.
        shared: what stands in the copy for an object of this id.

    Raises:
        ModelError: the module holds something that cannot be copied.
    """
    if Shards.of(module) is not None:
        raise ModelError(
            "a sharded model cannot be copied, as torch's FSDP has no copy: use koi.evaluate and "
            "koi.measure, which adapt in its place, or adapt and average a model that is whole"
        )
    try:
        return copy.deepcopy(module, dict(shared or {}))
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be copied ({error}): keep computed tensors (so use "
            "torch.nn.utils.parametrizations, not the older weight_norm hooks), generators and "
            "locks out of the module's attributes"
        ) from error
