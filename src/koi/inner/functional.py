"""``task.loss(model)`` as a pure function of the parameters and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from koi.phi.arithmetic import Tensors
from koi.phi.learned import Learned


class TaskLoss(nn.Module):
    """``task.loss(model)`` as a module's forward, so that tensors can be substituted in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: Any) -> Tensor:
        """Return the task's loss of the model."""
        loss: Tensor = task.loss(self.model)
        return loss


class PureLoss:
    """The loss of a module with other parameters, and other buffers, in the place of its own."""

    def __init__(self, model: nn.Module, learned: Learned) -> None:
        self._objective = TaskLoss(model)
        self._params = [f"model.{name}" for name in learned.params]
        self._buffers = [f"model.{name}" for name in (*learned.buffers, *learned.constants)]
        tensors = (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        # torch looks for tied tensors in every call, which takes as long as a small layer
        self._tied = len({id(tensor) for _, tensor in tensors}) < len(tensors)

    def __call__(self, params: Sequence[Tensor], task: Any) -> Tensor:
        """Return the loss at ``params``; the module's own buffers move."""
        return self._call(dict(zip(self._params, params, strict=True)), task)

    def with_buffers(
        self, params: Sequence[Tensor], buffers: Sequence[Tensor], task: Any
    ) -> tuple[Tensor, Tensors]:
        """Return the loss at ``params`` and ``buffers``, and the buffers after it."""
        moved = [buffer.clone() for buffer in buffers]
        tensors = dict(zip(self._params, params, strict=True))
        tensors.update(zip(self._buffers, moved, strict=True))
        loss = self._call(tensors, task)
        return loss, [tensors[name].detach() for name in self._buffers]

    def _call(self, tensors: dict[str, Tensor], task: Any) -> Tensor:
        loss: Tensor = functional_call(self._objective, tensors, (task,), tie_weights=self._tied)
        return loss
