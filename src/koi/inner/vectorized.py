"""All tasks of a meta-batch at once: the user's own loss under ``torch.func.vmap``.

Parameters and buffers are stacked, one row to a task. Stacked parameters are ordinary leaves: the
sum of the tasks' losses has each task's gradient, and an element-wise optimizer steps all tasks at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from koi.errors import EngineError
from koi.inner.base import (
    SHARED_DRAWS,
    InnerLoop,
    Metric,
    attention_kernel,
    depends_on_model,
    drawn_views,
    explained,
    finite_tasks,
    metrics_of,
    scalar,
)
from koi.inner.branches import ASKED, CommonBranch
from koi.inner.functional import PureLoss
from koi.inner.layers.embedding import EmbeddingPadding
from koi.inner.layers.libraries import values_unread
from koi.inner.layers.normalisation import map_normalisation, map_weight_norm
from koi.inner.layers.recurrence import map_recurrence
from koi.inner.optimizers.bound import BoundOptimizer, bound_optimizer
from koi.inner.optimizers.elementwise import check_elementwise
from koi.inner.second_order import SecondOrderEngine
from koi.inner.stepwise import Given
from koi.inner.working import WorkingCopy
from koi.phi import arithmetic
from koi.phi.arithmetic import Tensors
from koi.phi.outcome import Outcome, OutcomeMean, Phi
from koi.randomness import Place, capture, restore, same_host_draws
from koi.tasks import (
    TaskBatch,
    check_fields,
    everything_of,
    has,
    query_of,
    stack,
    tensors_of,
    views,
    with_tensors,
)

Result = TypeVar("Result")


class VectorizedEngine(SecondOrderEngine):
    """Runs the tasks of a meta-batch as one computation, at most chunk_size of them at a time."""

    def __init__(self, model: nn.Module, inner: InnerLoop, chunk_size: int | None = None) -> None:
        if inner.rule is None:
            check_elementwise(inner, inner.learned.params_of(model))
        if inner.scale is not None:
            raise EngineError(
                "float16 has a loss scale that follows each task's gradients, which tasks that run "
                "at once cannot: use autocast=torch.bfloat16, or vectorize=False"
            )
        self.inner = inner
        self.chunk_size = chunk_size
        self.copy = WorkingCopy(model, inner.learned, prepare=self._prepare)
        self._padded = any(
            isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None
            for part in model.modules()
        )
        self._pure = PureLoss(self.copy.module, inner.learned)
        self._stacks: dict[int, tuple[Tensors, BoundOptimizer]] = {}
        self._places = set(range(len(inner.learned.params)))
        self._adapted = inner.learned.those_adapted(sorted(self._places))
        self._constant: dict[int, Tensor] = {}
        self._minibatches_draw = False
        self._looked_at: set[Any] = set()
        self._branches = False

    @torch.enable_grad()
    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to all tasks, chunk by chunk."""
        means = OutcomeMean()
        for first, chunk in self._chunks(phi, batch):
            with explained(place, first, len(chunk)), self._running(chunk):
                place.set("inner", first or None)
                steps = self._views(chunk, num_steps, place, first)
                adapted = self.run(phi, chunk.stacked, steps, num_steps)
                assert adapted is not None, "only float16 overflows"
                kept, losses = self._finite(adapted, first, place)
            rows = range(len(chunk)) if kept is None else kept
            weights = chunk.weights_of(rows)
            last = max((row for row, w in zip(rows, weights, strict=True) if w > 0), default=-1)
            counts = None
            if chunk.weights is not None:
                counts = arithmetic.weights_like(weights, phi.params)
            means.add(
                means_of(adapted.given, kept, counts),
                means_of(arithmetic.movements(self.buffers, phi.buffers), kept, counts),
                [each[last] for each in self.constants] if losses else [],
                means_of(adapted.moments, kept, counts, self.optimizer.per_task(adapted.moments)),
                losses,
                weights,
            )
        return means.outcome(len(batch))

    @torch.enable_grad()
    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step, shape (tasks, steps + 1)."""
        curves = []
        for first, chunk in self._chunks(phi, batch):
            curve: Tensors = []
            with explained(place, first, len(chunk)), self._running(chunk):
                place.set("inner", first or None)
                steps = self._views(chunk, num_steps, place, first)
                self.adapt_to(phi, steps, partial(self._measure, chunk.stacked, curve))
            curves.append(torch.stack(curve, dim=1))
        return torch.cat(curves)

    @torch.enable_grad()
    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        values: Tensors = []
        for first, chunk in self._chunks(phi, batch):
            with explained(place, first, len(chunk)), self._running(chunk):
                place.set("inner", first or None)
                self.adapt_to(phi, self._views(chunk, num_steps, place, first))
            for row, task in enumerate(chunk.tasks):
                self.copy.begin(phi)
                rows = [t[row] for t in (*self.params, *self.buffers, *self.constants)]
                self.inner.learned.put(self.copy.module, rows)
                number, module = first + row, self.copy.module
                with explained(place, number, 1):
                    values += metrics_of(metric, module, task, self.inner, number, place)
        return values

    def begin(self, phi: Phi) -> None:
        """Set every row to φ."""
        with torch.no_grad():
            for i in self._adapted:
                self.params[i].copy_(phi.params[i])
        size = self.params[0].shape[0]
        self._constant = {i: phi.params[i].detach() for i in self._places - set(self._adapted)}
        for i, value in self._constant.items():  # a row for each task, all in the same memory
            self.params[i] = value.expand(size, *value.shape).requires_grad_()
        self.buffers = [b.expand(size, *b.shape).clone() for b in phi.buffers]
        self.constants = [b.expand(size, *b.shape).clone() for b in phi.constants]

    def loss(self, view: Any, step: int, params: Tensors | None = None) -> Tensor:
        """Return each task's loss, shape (tasks,)."""
        params = self._inner_params() if params is None else params
        run = partial(self._mapped, view, step, params)
        losses, moved = self._unshared(run, type(view), step)
        before = [*self.buffers, *self.constants]
        if any(
            a.shape != b.shape or a.dtype != b.dtype for a, b in zip(before, moved, strict=True)
        ):
            raise EngineError("a buffer changes its shape or type in forward")
        split = len(self.buffers)
        self.buffers, self.constants = moved[:split], moved[split:]
        return depends_on_model(losses, view, step)

    def rows(self, tensors: Sequence[Tensor]) -> Tensors:
        """Return the tensors with a row for each task."""
        size = self.params[0].shape[0]
        return [t.expand(size, *t.shape) for t in tensors]

    def each(self, function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        """Return the function mapped over the tasks' tensors; φ is the same for all."""
        mapped: Callable[..., Tensors] = vmap(
            function, in_dims=(None, 0, 0, 0), randomness="different"
        )
        return mapped

    def outer_loss(self, view: Any, step: int) -> Tensor:
        """Return each task's loss with a gradient of its own for all that learns."""
        return self.loss(view, step, self.params)

    def buffers_now(self) -> Tensors:
        """Return the buffers and constants, which no loss changes in place."""
        return [*self.buffers, *self.constants]

    def put_buffers(self, values: Tensors) -> None:
        """Let the buffers and constants have these values."""
        split = len(self.buffers)
        self.buffers, self.constants = values[:split], values[split:]

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Undo what a loss that is no inner step does to the buffers."""
        before = self.buffers, self.constants
        yield
        self.buffers, self.constants = before

    def _inner_params(self) -> Tensors:
        """Return the parameters; what no inner step moves is one tensor for all tasks."""
        return [self._constant.get(i, rows) for i, rows in enumerate(self.params)]

    def _mapped(self, view: Any, step: int, params: Tensors) -> tuple[Tensor, Tensors]:
        def one(params: Tensors, buffers: Tensors, tensors: dict[str, Tensor]) -> Any:
            task = with_tensors(view, tensors)
            if self.inner.autocast is None:
                loss, buffers = self._pure.with_buffers(params, buffers, task)
            else:
                # autocast acts on what reaches a derivative's level, not on what vmap takes first
                level: Any = vjp(
                    lambda _: self._pure.with_buffers(params, buffers, task),
                    torch.zeros(()),
                    has_aux=True,
                )
                loss, _, buffers = level
            check_fields(task, {**fields, **tensors})
            return scalar(loss, task, step), buffers

        fields = everything_of(view)
        own = [None if p is self._constant.get(i) else 0 for i, p in enumerate(params)]
        together: Callable[..., tuple[Tensor, Tensors]] = vmap(
            one, (own, 0, 0), randomness="different"
        )
        branch = CommonBranch(type(view).__name__) if self._branches else nullcontext()
        with branch, self.inner.precision(params[0].device):
            return together(params, [*self.buffers, *self.constants], tensors_of(view))

    def _measure(self, stacked: Any, curve: Tensors) -> None:
        view = vmap_tasks(lambda task: [query_of(task)], stacked)[0]
        step = len(curve)
        # with gradients, since a loss may be made of derivatives of the model
        run = partial(self._mapped, view, step, self._inner_params())
        curve.append(self._unshared(run, type(view), "query", step)[0].detach())

    def _views(self, chunk: TaskBatch, num_steps: int, place: Place, first: int) -> list[Any]:
        """Return the stacked tasks as each inner step sees them."""
        if not has(chunk.stacked, "minibatches"):
            return [chunk.stacked] * num_steps
        if not self._minibatches_draw:
            try:
                run = partial(vmap_tasks, lambda task: list(views(task, num_steps)), chunk.stacked)
                return self._unshared(run, type(chunk.stacked), "minibatches")
            except RuntimeError as error:
                if "random" not in str(error):
                    raise
                self._minibatches_draw = True
        each = drawn_views(chunk, num_steps, place, first)
        return [stack(step) for step in zip(*each, strict=True)]

    def _chunks(self, phi: Phi, batch: TaskBatch) -> Iterator[tuple[int, TaskBatch]]:
        """Yield each chunk with the number of its first task, the stacked tensors made ready."""
        for first, chunk in batch.chunks(self.chunk_size or len(batch)):
            size = len(chunk)
            if size not in self._stacks:
                rows = [p.detach().expand(size, *p.shape) for p in phi.params]
                for i in self._adapted:
                    rows[i] = rows[i].clone()
                leaves = [leaf.requires_grad_() for leaf in rows]
                self._stacks[size] = leaves, bound_optimizer(self.inner, leaves, num_tasks=size)
            self.params, self.optimizer = self._stacks[size]
            yield first, chunk

    @contextmanager
    def _running(self, chunk: TaskBatch) -> Iterator[None]:
        """Run the tasks, and check that they have left nothing behind in the module or themselves.

        What a stack's tensors become does not reach the tasks that it is of.
        """
        self.copy.watch()
        own = tensors_of(chunk.stacked).values()
        versions = [tensor._version for tensor in own]
        device = self.params[0].device.type
        padding = EmbeddingPadding() if self._padded else nullcontext()
        try:
            with attention_kernel(self.inner, True, device), padding, values_unread():
                yield
        except RuntimeError:
            self.copy.untouched()  # names what torch meets as a tensor that has escaped
            raise
        self.copy.untouched()
        if versions != [tensor._version for tensor in own]:
            raise EngineError(
                "the loss changes the task's own tensors in place, and all tasks at once change a "
                "copy of them: use vectorize=False"
            )

    def _prepare(self, module: nn.Module) -> None:
        map_normalisation(module, self.inner.autocast is not None, join=True)
        map_recurrence(module, kernel=not self.inner.algorithm.second_order)
        if self.inner.algorithm.second_order:
            map_weight_norm(module)

    def _unshared(self, run: Callable[[], Result], *what: Any) -> Result:
        """Run what may not draw what all tasks would share; looked for at the first time.

        Then it is also seen whether it asks for the values of tensors.
        """
        if what in self._looked_at:
            return run()
        before = capture()
        try:
            result = run()
        except RuntimeError as error:
            if self._branches or ASKED not in str(error):
                raise
            self._branches = True  # not from the start: a mode costs a little at each operation
            restore(before)
            result = run()
        if not same_host_draws(before, capture()):
            raise EngineError(SHARED_DRAWS)
        self._looked_at.add(what)
        return result

    def _finite(
        self, adapted: Given, first: int, place: Place
    ) -> tuple[list[int] | None, list[list[float]]]:
        """Return which rows are kept, None for all, and their losses."""
        rows = adapted.losses.t().tolist()
        total = arithmetic.norm(adapted.given) + adapted.losses.sum()
        if bool(total.isfinite()):
            return None, rows
        norms = arithmetic.norm(adapted.given, stacked=True).tolist()
        kept = finite_tasks(rows, norms, first, place, self.inner.skip_nonfinite)
        return kept, [rows[row] for row in kept]


def means_of(
    tensors: Tensors,
    kept: list[int] | None,
    weights: Tensor | None = None,
    stacked: list[bool] | None = None,
) -> Tensors:
    """Return the means over the kept rows (None: all); what is not stacked stays as it is."""
    flags = [True] * len(tensors) if stacked is None else stacked
    tensors = [t.detach() for t in tensors]
    return [
        arithmetic.mean_of(t if kept is None else t[kept], weights) if rows else t
        for t, rows in zip(tensors, flags, strict=True)
    ]


def vmap_tasks(function: Any, stacked: Any) -> list[Any]:
    """Map a function from a task to a list of tasks over stacked tasks; it must not draw."""
    templates: list[Any] = []

    def one(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        templates[:] = function(with_tensors(stacked, tensors))
        return [tensors_of(task) for task in templates]

    rows = vmap(one, randomness="error")(tensors_of(stacked))
    return [with_tensors(task, row) for task, row in zip(templates, rows, strict=True)]
