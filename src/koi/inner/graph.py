"""The inner loop as pure functions that the compiler can turn into one graph.

A few inner steps of a small network are written out one after the other, which lets the compiler
join what they share. Otherwise they are a ``scan`` over the views of the task, so that the graph
does not grow with their number, and in evaluation one graph serves any number of them. Gradients
and optimizer are part of it, so that it needs no autograd when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from koi.inner.base import InnerLoop, attention_kernel
from koi.inner.functional import PureLoss
from koi.inner.internals import scan
from koi.inner.optimizers import UpdateRule
from koi.inner.stepwise import filled
from koi.parameters import Tensors
from koi.tasks import query_of, tensors_of, views, with_tensors

TensorDict = dict[str, Tensor]
Target = Callable[[TensorDict], Any]

# Inner steps times parameter tensors: up to here a graph with all steps compiles in seconds.
_MOST_UNROLLED = 64


class State(NamedTuple):
    """What an inner step changes: parameters, buffers, the optimizer's moments."""

    params: Tensors
    buffers: Tensors
    moments: Tensors


Body = Callable[[State, TensorDict], tuple[State, Tensor]]


def unrolled(body: Body, start: State, steps: TensorDict) -> tuple[State, Tensor]:
    """Return the state after all steps, and what each gives, stacked; the steps written out."""
    state, results = start, []
    for step in range(next(iter(steps.values())).shape[0]):
        state, result = body(state, {name: tensor[step] for name, tensor in steps.items()})
        results.append(result)
    return state, torch.stack(results)


class TrainOutput(NamedTuple):
    """Means over the tasks; and the losses, the tasks' norms and ‖mean(φ̃) − φ‖ in one tensor."""

    means: State
    figures: Tensor


@dataclass(frozen=True)
class InnerGraph:
    """Pure functions of φ and the tensors of a task, or of many tasks stacked.

    Args:
        pure: the loss as a function of parameters and buffers.
        inner: the settings of the inner loop.
        rule: the inner optimizer.
        used: which of the learned parameters the loss uses; the others stay as they are.
        task: a task whose class and settings all tasks share.
        view: likewise for what an inner step sees of a task; None: the task itself, always.
        num_tasks: rows of the stacked tensors; None: one task, not stacked.
        device_type: where the tensors are, "cpu" or "cuda".
    """

    pure: PureLoss
    inner: InnerLoop
    rule: UpdateRule
    used: tuple[int, ...]
    task: Any
    view: Any
    num_tasks: int | None
    device_type: str

    def attention(self) -> AbstractContextManager[Any]:
        """Return the context in which `train` and `evaluate` run."""
        return attention_kernel(self.inner, self.num_tasks is not None, self.device_type)

    def prepare(self, task: TensorDict, num_steps: int) -> TensorDict:
        """Return the tensors of the task's views, stacked along the inner steps."""

        def split(tensors: TensorDict) -> list[TensorDict]:
            return [tensors_of(v) for v in views(with_tensors(self.task, tensors), num_steps)]

        if self.view is None or num_steps == 0:
            return {"step": torch.arange(num_steps)}
        rows = split(task) if self.num_tasks is None else vmap(split)(task)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def train(self, phi: State, task: TensorDict, steps: TensorDict) -> TrainOutput:
        """Return what a meta-batch gives: means over the tasks, losses and norms."""
        start = self._spread(phi)
        if self.inner.algorithm == "maml":
            result, after, losses = self._second_order(start, task, steps)
        else:
            few = next(iter(steps.values())).shape[0] * len(start.params) <= _MOST_UNROLLED
            through = unrolled if few else self._scanned
            after, losses = through(partial(self._step, task), start, steps)
            result = after.params
        if self.inner.algorithm == "fomaml":
            every = tuple(range(len(after.params)))
            grads, loss, _ = self._gradients(after, *self._outer(task, steps), every)
            result = filled(grads, after.params)
            losses = torch.cat([losses, loss.unsqueeze(0)])
        norms = self._norms(result)
        kept = losses.isfinite().all(0) & norms.isfinite()
        split = self.rule.num_slots * len(start.params)
        moments = self._means(after.moments[:split], kept)
        means = State(
            self._means(result, kept),
            self._means(after.buffers[: len(self.inner.learned.buffers)], kept),
            moments + [count.clone() for count in after.moments[split:]],
        )
        moved = [m - p for m, p in zip(means.params, phi.params, strict=True)]
        distance = torch.stack([m.square().sum() for m in moved]).sum().sqrt()
        figures = [losses.flatten(), norms.flatten(), distance.flatten()]
        return TrainOutput(means, torch.cat([f.to(losses.dtype) for f in figures]))

    def evaluate(self, phi: State, task: TensorDict, steps: TensorDict) -> Tensor:
        """Return the query losses before and after each step, shape (steps + 1[, tasks])."""
        start = self._spread(phi)
        before = self._loss(start, self._query, task).unsqueeze(0)
        if next(iter(steps.values())).shape[0] == 0:
            return before

        def body(state: State, tensors: TensorDict) -> tuple[State, Tensor]:
            state, _ = self._step(task, state, tensors)
            return state, self._loss(state, self._query, task)

        _, after = self._scanned(body, start, steps)
        return torch.cat([before, after])

    def adapt(self, phi: State, task: TensorDict, steps: TensorDict) -> Tensors:
        """Return each task's parameters and buffers after the steps, in one list."""
        state = self._spread(phi)
        if next(iter(steps.values())).shape[0] > 0:
            state, _ = self._scanned(partial(self._step, task), state, steps)
        return [*state.params, *state.buffers]

    def _second_order(
        self, start: State, task: TensorDict, steps: TensorDict
    ) -> tuple[Tensors, State, Tensor]:
        """MAML: the gradient at φ of the query loss after all steps, which are unrolled."""

        def after_all(params: Tensors) -> tuple[Tensor, tuple[State, Tensor]]:
            first = State(params, start.buffers, start.moments)
            state, losses = unrolled(partial(self._step, task), first, steps)
            outer = self._loss(state, *self._outer(task, steps))
            return outer.sum(), (state, torch.cat([losses, outer.unsqueeze(0)]))

        grads, (state, losses) = grad(after_all, has_aux=True)(start.params)
        return grads, state, losses

    def _scanned(self, body: Body, start: State, steps: TensorDict) -> tuple[State, Tensor]:
        """Return what `unrolled` returns, by a graph that does not grow with the steps."""

        def plain(carry: tuple[Tensors, ...], tensors: TensorDict) -> tuple[Any, Tensor]:
            state, result = body(self._unpacked(carry), tensors)
            return self._packed(state), result.clone()

        carry, results = scan(plain, self._packed(start), steps)
        return self._unpacked(carry), results

    def _packed(self, state: State) -> tuple[Tensors, ...]:
        """Return contiguous copies, as a scan carries them, that share no memory.

        Weights of convolutions have their channels last on the CPU, as `patches_product` reads
        them and makes their gradient.
        """

        def packed(tensor: Tensor) -> Tensor:
            moved = tensor.movedim(-3, -1) if self._is_convolution(tensor) else tensor
            return moved.clone(memory_format=torch.contiguous_format)

        return tuple([packed(tensor) for tensor in part] for part in state)

    def _unpacked(self, carry: tuple[Tensors, ...]) -> State:
        """Return the state whose packed tensors these are."""
        return State(
            *[[t.movedim(-1, -3) if self._is_convolution(t) else t for t in part] for part in carry]
        )

    def _is_convolution(self, tensor: Tensor) -> bool:
        own_dims = tensor.dim() - (self.num_tasks is not None)
        return own_dims == 4 and self.device_type == "cpu"

    def _step(self, task: TensorDict, state: State, tensors: TensorDict) -> tuple[State, Tensor]:
        """Return the state after one inner step, and the loss before it."""
        seen = task if self.view is None else tensors
        grads, loss, buffers = self._gradients(state, self._seen, seen, self.used)
        params, moments = self.rule.step(grads, state.params, state.moments)
        return State(params, buffers, moments), loss

    def _gradients(
        self, state: State, target: Target, tensors: TensorDict, used: tuple[int, ...]
    ) -> tuple[list[Tensor | None], Tensor, Tensors]:
        """Return the gradients (None where unused), the losses, the buffers after them."""

        def loss_of(
            learning: Tensors, params: Tensors, buffers: Tensors, tensors: TensorDict
        ) -> tuple[Tensor, Tensors]:
            params = list(params)
            for index, param in zip(used, learning, strict=True):
                params[index] = param
            return self._one_loss(params, buffers, target, tensors)

        def total(learning: Tensors, *others: Any) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            losses, moved = self._mapped(loss_of)(learning, *others)
            return losses.sum(), (losses, moved)

        given = [state.params[index] for index in used], state.params, state.buffers, tensors
        if self.inner.algorithm == "maml":
            # vmap inside of both derivatives: torch 2.13 gets second derivatives of affine
            # normalisations wrong in grad(vmap(grad(…)))
            found, (loss, moved) = grad(total, has_aux=True)(*given)
        else:
            found, (loss, moved) = self._mapped(grad_and_value(loss_of, has_aux=True))(*given)
        grads: list[Tensor | None] = [None] * len(state.params)
        for index, gradient in zip(used, found, strict=True):
            grads[index] = gradient
        return grads, loss, moved

    def _loss(self, state: State, target: Target, tensors: TensorDict) -> Tensor:
        def loss_of(params: Tensors, buffers: Tensors, tensors: TensorDict) -> Tensor:
            return self._one_loss(params, buffers, target, tensors)[0]

        losses: Tensor = self._mapped(loss_of)(state.params, state.buffers, tensors)
        return losses

    def _one_loss(
        self, params: Tensors, buffers: Tensors, target: Target, tensors: TensorDict
    ) -> tuple[Tensor, Tensors]:
        with self.inner.precision(torch.device(self.device_type)):
            return self.pure.with_buffers(params, buffers, target(tensors))

    def _seen(self, tensors: TensorDict) -> Any:
        """Return what an inner step sees."""
        return with_tensors(self.task if self.view is None else self.view, tensors)

    def _query(self, tensors: TensorDict) -> Any:
        """Return the task on its held-out data."""
        return query_of(with_tensors(self.task, tensors))

    def _outer(self, task: TensorDict, steps: TensorDict) -> tuple[Target, TensorDict]:
        """Return what FOMAML and MAML differentiate, as `koi.tasks.outer_view` does."""
        if hasattr(self.task, "query"):
            return self._query, task
        if self.view is None:
            return self._seen, task
        return self._seen, {name: tensor[-1] for name, tensor in steps.items()}

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.num_tasks is None else vmap(function, randomness="different")

    def _spread(self, phi: State) -> State:
        """Return φ as every task starts from it."""
        if self.num_tasks is None:
            return phi
        split = self.rule.num_slots * len(phi.params)
        rows = [
            [t.expand(self.num_tasks, *t.shape) for t in group]
            for group in (phi.params, phi.buffers, phi.moments[:split])
        ]
        return State(rows[0], rows[1], rows[2] + phi.moments[split:])

    def _norms(self, tensors: Tensors) -> Tensor:
        """Return the Euclidean norm of each task's tensors, shape ([tasks])."""
        first = 0 if self.num_tasks is None else 1
        return torch.stack([t.square().flatten(first).sum(-1) for t in tensors]).sum(0).sqrt()

    def _means(self, tensors: Tensors, kept: Tensor) -> Tensors:
        if self.num_tasks is None:
            return [t.contiguous() for t in tensors]
        if not self.inner.skip_nonfinite:
            return [t.mean(0).contiguous() for t in tensors]
        weights = [kept.reshape(-1, *[1] * (t.dim() - 1)) for t in tensors]
        pairs = zip(tensors, weights, strict=True)
        return [(torch.where(w, t, 0).sum(0) / kept.sum()).contiguous() for t, w in pairs]
