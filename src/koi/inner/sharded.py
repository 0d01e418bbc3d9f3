"""One task at a time on a model that is sharded over ranks, which cannot be copied.

The steps are taken on the user's module itself, on the rows of its parameters that are here; φ is
put aside meanwhile and put back after each meta-batch, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from koi.errors import ConfigurationError, EngineError, RankError
from koi.inner.base import InnerLoop, Metric, finite_tasks
from koi.inner.eager import EagerEngine, Kept
from koi.inner.optimizers.bound import bound_optimizer
from koi.inner.optimizers.recognition import why_no_rule
from koi.inner.stepwise import Given
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Outcome, Phi
from koi.phi.shards import Shards, local, settle
from koi.randomness import Place
from koi.tasks import TaskBatch

Result = TypeVar("Result")


class InPlace:
    """The user's module in the place of a working copy (`koi.inner.working.WorkingCopy`)."""

    def __init__(self, model: nn.Module, inner: InnerLoop) -> None:
        self.module, self._learned = model, inner.learned
        self.params = inner.learned.params_of(model)
        self.as_it_began = True

    def begin(self, phi: Phi) -> None:
        """Set the module to φ."""
        settle(self.module)
        names, module = self._learned, self.module
        arithmetic.copy_(self.params, phi.params)
        arithmetic.copy_(names.buffers_of(module), phi.buffers)
        arithmetic.copy_(names.constants_of(module), phi.constants)

    def end(self) -> tuple[Tensors, Tensors]:
        """Return the buffers and constants that the task left."""
        return self._learned.buffers_of(self.module), self._learned.constants_of(self.module)

    def check(self) -> None:
        """Do nothing: there are no parameters but those that learn."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo what a loss that is no inner step does to buffers."""
        tensors = [*self.end()[0], *self.end()[1]]
        values = arithmetic.clone(tensors)
        yield
        arithmetic.copy_(tensors, values)


class ShardedEngine(EagerEngine):
    """Runs the tasks of a meta-batch one after the other, all ranks of a group the same ones."""

    def __init__(self, model: nn.Module, inner: InnerLoop, shards: Shards) -> None:
        self.inner, self._shards = inner, shards
        self.copy: Any = InPlace(model, inner)
        self.params = self.copy.params
        self.precision = inner.precision(self.params[0].device)
        self.optimizer = bound_optimizer(inner, self.params)
        self.has_buffers = bool(inner.learned.buffers or inner.learned.constants)
        self._on_the_way_back = False

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to each task in turn."""
        run = super().meta_batch
        return self._aside(phi, lambda start: run(start, batch, num_steps, place))

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step."""
        self._meet()
        run = super().evaluate
        return self._aside(phi, lambda start: run(start, batch, num_steps, place))

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        self._meet()
        run = super().measure
        return self._aside(phi, lambda start: run(start, batch, num_steps, place, metric))

    def run(self, phi: Phi, task: Any, steps: Any, num_steps: int) -> Given | None:
        """Do what the algorithm does with one task."""
        found = super().run(phi, task, steps, num_steps)
        # φ̃ is where φ is to be again
        return found and found._replace(given=arithmetic.clone(found.given))

    def loss(self, view: Any, step: int, params: Tensors | None = None) -> Tensor:
        """Return the loss of the module."""
        settle(self.copy.module)  # a pass without a way back has left gathered weights there
        return super().loss(view, step, params)

    def gradients(
        self, loss: Tensor, _params: Sequence[Tensor], _create_graph: bool = False
    ) -> tuple[Tensor | None, ...] | None:
        """Return the rows of the mean gradient over the ranks.

        By backward, as FSDP gives none to `torch.autograd.grad`.
        """
        self._on_the_way_back = True
        loss.backward()
        self._on_the_way_back = False
        settle(self.copy.module)
        own = [self.copy.module.get_parameter(name) for name in self.inner.learned.params]
        grads = tuple(None if p.grad is None else local(p.grad) for p in own)
        for param in own:
            param.grad = None
        return grads

    def _finite(self, way: Tensors, each: Tensor, number: int, place: Place) -> Kept:
        """Return the task's losses, and how long its way is, as all ranks of the group see them."""
        squares = arithmetic.norm(way).double().square().reshape(1)
        figures = self._shards.total(torch.cat([each.double() / len(self._shards.ranks), squares]))
        *losses, square = figures.tolist()
        distance = square**0.5
        kept = finite_tasks([losses], [distance], number, place, self.inner.skip_nonfinite)
        return Kept([losses] if kept else [], distance)

    def _meet(self) -> None:
        """Wait for the other ranks of the group, without which there are no layers.

        Raises:
            RankError: in a training they go on without it.
        """
        if self._shards.all_evaluate(True, self.params[0].device) is None:
            raise RankError(
                "some ranks of a task group evaluate or measure and others do not, where each has "
                "but a part of φ: call koi.evaluate and koi.measure on all of them"
            )

    def _aside(self, phi: Phi, work: Callable[[Phi], Result]) -> Result:
        """Do the work from a copy of φ, and put that back."""
        module = self.copy.module
        params = list(module.parameters())
        start = replace(
            phi,
            params=arithmetic.clone(phi.params),
            buffers=arithmetic.clone(phi.buffers),
            constants=arithmetic.clone(phi.constants),
        )
        grads = [p.grad for p in params]
        for param in params:
            param.grad = None
        try:
            if self._on_the_way_back:
                raise EngineError(
                    "an error has ended the backward pass of this sharded model, after which "
                    "torch's FSDP gives no right gradients: go on in a new process, with "
                    "resume=True or another model"
                )
            return work(start)
        except BaseException:
            settle(module, after_error=True)
            raise
        finally:
            self.copy.begin(start)
            for param, grad in zip(module.parameters(), grads, strict=True):
                param.grad = grad


# Of torch.optim those that work element by element, and so on rows alone.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)


def check_sharded(settings: Any, params: Tensors, inner: torch.optim.Optimizer) -> None:
    """Check that settings work on a model of which each rank holds a part.

    Args:
        settings: the learner's.
        params: the rows of its parameters that are here.
        inner: the inner optimizer.

    Raises:
        ConfigurationError: some do not.
    """
    make = settings.meta_optimizer
    outer = None if make is None else make([p.detach().clone() for p in params])
    wrong = {
        f"algorithm={settings.algorithm!r}: take 'reptile' or 'fomaml'": settings.algorithm
        not in ("reptile", "fomaml"),
        "vectorize=True: take False": settings.vectorize is True,
        "compile: take False": bool(settings.compile),
        "autocast=torch.float16: take bfloat16": settings.autocast is torch.float16,
        "clip_inner: leave it out, or use clip_meta": settings.clip_inner is not None,
        "learn_step_size: leave it out": settings.learn_step_size is not None,
        "adapts or learns: leave them out": (settings.adapts, settings.learns) != (None, None),
        f"inner_optimizer, which gave {type(inner).__name__}: take torch.optim's SGD, Adam or "
        "AdamW as they come": why_no_rule(inner) is not None,
        f"meta_optimizer, which gave {type(outer).__name__} and may not work element by element: "
        "take one of torch.optim's that does": outer is not None
        and type(outer) not in _ELEMENTWISE,
    }
    problems = [problem for problem, there in wrong.items() if there]
    if problems:
        raise ConfigurationError([f"a sharded model does not go with {p}" for p in problems])
