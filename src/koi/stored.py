"""A learner's state as data: in memory, in a file, and averaged over a training."""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from koi import allowed
from koi.configured import Configured
from koi.errors import CheckpointError, ConfigurationError
from koi.phi.arithmetic import copy_
from koi.phi.learned import copy_module
from koi.training import checkpoint
from koi.training.state import TrainingState

AnyLearner = TypeVar("AnyLearner", bound="Stored")


class Stored(Configured):
    """A learner that can be written down and go on from that."""

    _state: TrainingState

    @abstractmethod
    def __init__(self, model: nn.Module, **settings: Any) -> None: ...

    @property
    def learned_step_sizes(self) -> dict[str, Tensor]:
        """The inner rates that φ holds, by the names of parameters, as ``learn_step_size`` says.

        They are φ's own tensors: shape of the parameter, or (num_steps,).

        >>> import torch
        >>> from koi import Koi
        >>> settings = {"algorithm": "maml", "learn_step_size": "layer", "num_steps": 2}
        >>> Koi(torch.nn.Linear(1, 1), 0.5, **settings).learned_step_sizes["bias"]
        tensor([0.5000, 0.5000])
        """
        names = self.settings.learned(self.model)
        params = names.params_of(self.model)
        rates = self._state.rates(params, names, self.settings)
        return dict(zip(names.those_adapted(names.params), rates, strict=False))

    def averaged(self: AnyLearner) -> AnyLearner:
        """Return a learner whose φ is the exponential mean of this one's, to be used or saved.

        It is a copy, with settings, history and moments as they are here; frozen parameters are
        shared. The mean is over all meta-iterations since ``average`` was set:
        Σ β^(t−i) φ_i / Σ β^(t−i), of parameters and floating buffers.

        Raises:
            ConfigurationError: ``average`` is None, or there was no meta-iteration since.

        >>> import torch
        >>> from koi import Koi
        >>> from koi.problems import Lines
        >>> koi = Koi(torch.nn.Linear(1, 1), step_size=0.02, num_iterations=9, average=0.9)
        >>> model = koi.train(Lines())
        >>> koi.averaged().model.weight.shape
        torch.Size([1, 1])
        """
        mean = self._state.mean
        if self.settings.average is None or not mean.count:
            raise ConfigurationError(
                ["averaged() needs Koi(…, average=0.999) or the like, and a meta-iteration since"]
            )
        frozen = {
            id(p): p for p in self.settings.learned(self.model).others_of(self.model).values()
        }
        other = type(self)(copy_module(self.model, frozen), **vars(self.settings))
        other.load_state_dict(self.state_dict())
        names = self.settings.learned(other.model)
        params = names.those_learned(names.params_of(other.model))
        rates = other._state.learned_rates
        copy_([*params, *rates, *names.buffers_of(other.model)], mean.values)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training needs to go on, in copies that stay as they are.

        That is φ and the buffers, the optimizers' states, settings, history, the state of the task
        distribution and callbacks of the last training (where they have ``state_dict``) and,
        without a seed, of the global generators. Settings that are code are not in it, nor are
        frozen parameters, of which it has a digest. ``torch.save`` can write it.
        """
        return deepcopy(checkpoint.contents(self, self._state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, as if training had never stopped.

        Tasks, callbacks and generators take theirs as the next training begins.

        Raises:
            ConfigurationError: ``state`` is no dictionary.
            CheckpointError: the model or any setting is another: all differences are named, and
                nothing has changed.

        >>> import torch
        >>> from koi import Koi
        >>> koi, other = (Koi(torch.nn.Linear(2, 1), step_size=0.1) for _ in range(2))
        >>> other.load_state_dict(koi.state_dict())
        >>> torch.equal(other.model.weight, koi.model.weight)
        True
        """
        self._state.check_idle("load_state_dict")
        allowed.check(state=(state, allowed.instance(Mapping, "what state_dict gave")))
        saved = checkpoint.saved_from(state, "given to load_state_dict")
        checkpoint.go_on(self, self._state, saved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` into one file, of which nothing is executed when it is read.

        Args:
            path: the file; it appears under this name whole or not at all.

        Raises:
            ConfigurationError: ``path`` is no path.
            CheckpointError: it cannot be written.
        """
        allowed.check(path=(path, allowed.path))
        if self.settings.learned(self.model).shards is not None:
            raise CheckpointError(
                "koi.save writes one file, and a sharded model lies on several ranks: train with "
                "checkpoint_dir, or give torch.distributed.checkpoint koi.model.state_dict()"
            )
        checkpoint.save(self, self._state, Path(path))

    @classmethod
    def load(
        cls: type[AnyLearner], path: str | os.PathLike[str], model: nn.Module, **settings: Any
    ) -> AnyLearner:
        """Return a learner that goes on from a file of `save` or of `train`.

        Args:
            path: the file. Nothing in it is executed.
            model: a module with the parameters and buffers that were saved; it is set to φ.
            settings: arguments of `Koi` that are code (a callable inner_optimizer,
                meta_step_size or meta_optimizer) must be given again; others may be, and replace
                those in the file.

        Raises:
            ConfigurationError: an argument that cannot work.
            CheckpointError: the file cannot be read, does not fit the model, or needs settings.

        >>> import tempfile, torch
        >>> from koi import Koi
        >>> koi = Koi(torch.nn.Linear(2, 1), step_size=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     koi.save(folder + "/koi.safetensors")
        ...     same = Koi.load(folder + "/koi.safetensors", torch.nn.Linear(2, 1))
        >>> same.step_size, torch.equal(same.model.weight, koi.model.weight)
        (0.1, True)
        """
        allowed.check(path=(path, allowed.path))
        saved, known = checkpoint.read_or_offer(Path(path)), inspect.signature(cls).parameters
        koi = cls(model, **checkpoint.arguments(saved, settings, known))
        checkpoint.begin_with(koi, koi._state, saved)
        return koi
