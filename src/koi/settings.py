"""The settings of a learner: attributes that are checked whenever they are set."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from koi.algorithms import Algorithm
from koi.configuration import check_settings
from koi.errors import ConfigurationError
from koi.inner.checks.granted import frozen
from koi.inner.optimizers.rules import OptimizerFactory, layout_of, make_optimizer
from koi.phi.parameters import Learned, Tensors
from koi.phi.update import MetaOptimizerFactory, Schedule

# What `koi.Koi` is given besides the model; each is an attribute of that name.
SETTINGS = tuple(name for name in inspect.signature(check_settings).parameters if name != "model")
# What a checkpoint holds: the others have no influence on φ.
STORED = tuple(name for name in SETTINGS if name != "check")
_SETTINGS = frozenset(SETTINGS)


def _normalised(name: str, value: Any) -> Any:
    """Return a checked setting as Koi keeps it: NumPy's numbers become Python's own."""
    if name == "step_size":
        return float(value)
    counts = ("num_steps", "num_iterations", "meta_batch_size", "seed", "chunk_size")
    return int(value) if name in counts and value is not None else value


def of_engines(koi: Any) -> Any:
    """Return the settings that engines are made of, in a form to be compared."""
    return tuple(frozen(getattr(koi, name)) for name in _OF_ENGINES)


def optimizer_now(koi: Any) -> Any:
    """Return the settings of the inner optimizer as a factory that may read others makes it now.

    A name, a class or a partial of one always makes the same.
    """
    factory = koi.inner_optimizer
    if isinstance(factory, str | type) or (
        isinstance(factory, functools.partial) and isinstance(factory.func, type)
    ):
        return ()
    params = Learned.of(koi.model).params_of(koi.model)
    optimizer = make_optimizer(factory, params, koi.step_size)
    numbers = [
        value.tolist()
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and isinstance(value, Tensor)
    ]
    return type(optimizer), layout_of(optimizer, params), numbers


_OF_ENGINES = (
    *("algorithm", "step_size", "inner_optimizer", "vectorize", "compile"),
    *("on_nonfinite", "chunk_size", "autocast", "check"),
)


class Configured:
    """Settings as attributes, which go through the same checks whenever they are set.

    What is set takes effect at the next meta-iteration, in all that depends on it.
    """

    model: nn.Module
    step_size: float
    num_steps: int
    num_iterations: int
    meta_step_size: float | Schedule | None
    meta_batch_size: int
    inner_optimizer: str | OptimizerFactory
    inner_state: str
    meta_optimizer: MetaOptimizerFactory | None
    algorithm: str | Algorithm
    vectorize: str | bool
    compile: bool | str
    seed: int | None
    on_nonfinite: str
    chunk_size: int | None
    autocast: torch.dtype | None
    check: bool
    _changes: int  # how often a setting has been set
    _moments: Tensors | None

    def __init__(self, given: dict[str, Any]) -> None:
        check_settings(**given)
        self.__dict__.update({name: _normalised(name, value) for name, value in given.items()})
        self.__dict__["_changes"] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            ConfigurationError: a setting cannot work, or it is the model, which stays.
        """
        if name in _SETTINGS:
            now = {other: getattr(self, other) for other in ("model", *SETTINGS)}
            check_settings(**{**now, name: value})
            if name == "inner_optimizer" and value is not self.inner_optimizer:
                self._moments = None  # of another optimizer
            value = _normalised(name, value)
            self._changes += 1
        elif name == "model" and value is not self.model:
            raise ConfigurationError(
                ["koi.model cannot be replaced: its weights are φ; make a new Koi for a new model"]
            )
        self.__dict__[name] = value
