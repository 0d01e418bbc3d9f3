"""The inner loop as functions of tensors that the compiler can turn into graphs.

Either one graph is of all that a meta-batch takes, the inner steps written out one after the
other, which lets the compiler join what they share; or it is of one inner step, which serves any
number of them (`koi.inner.compiled.steps`). Gradients and optimizer are part of it, so that it
needs no autograd when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap

from koi.algorithms import given
from koi.inner.base import InnerLoop, attention_kernel
from koi.inner.compiled.values import Adapted, State, TrainOutput
from koi.inner.functional import PureLoss
from koi.inner.optimizers.clipping import clipped
from koi.inner.optimizers.rules import UpdateRule
from koi.inner.stepwise import filled
from koi.phi.arithmetic import Tensors, mean_of, movements, norm
from koi.tasks import has, query_of, tensors_of, views, with_tensors

TensorDict = dict[str, Tensor]
Target = Callable[[TensorDict], Any]


@dataclass(frozen=True)
class InnerFunctions:
    """Functions of φ and the tensors of a task, or of many stacked; only `step_` changes any.

    Args:
        pure: the loss as a function of parameters and buffers.
        inner: the settings of the inner loop.
        rule: the inner optimizer.
        used: which of the adapted parameters the loss uses; the others stay as they are.
        task: a task whose class and settings all tasks share.
        view: likewise for what an inner step sees of a task; None: the task itself, always.
        num_dims: the dimensions of each parameter, not stacked.
        num_tasks: rows of the stacked tensors; None: one task, not stacked.
        device_type: where the tensors are, "cpu" or "cuda".
    """

    pure: PureLoss
    inner: InnerLoop
    rule: UpdateRule
    used: tuple[int, ...]
    task: Any
    view: Any
    num_dims: tuple[int, ...]
    num_tasks: int | None
    device_type: str

    def attention(self) -> AbstractContextManager[Any]:
        """Return the context in which all that has a loss runs."""
        return attention_kernel(self.inner, self.num_tasks is not None, self.device_type)

    def prepare(self, task: TensorDict, num_steps: int) -> list[TensorDict]:
        """Return the tensors of each inner step's view; none where that is the task."""

        def split(tensors: TensorDict) -> list[TensorDict]:
            return [tensors_of(v) for v in views(with_tensors(self.task, tensors), num_steps)]

        if self.view is None:
            return [{}] * num_steps
        return split(task) if self.num_tasks is None else vmap(split)(task)

    def train(self, phi: State, task: TensorDict, steps: Sequence[TensorDict]) -> TrainOutput:
        """Return what a meta-batch gives, the inner steps written out."""
        start = self._spread(phi)
        if self.inner.through_steps:
            return self.outcome(phi, self._through_steps(start, task, steps))
        adapted = self._after(start, task, steps)
        if self.inner.algorithm.query_gradient:
            gradient, loss = self.outer_gradient(adapted.state, task, steps[-1])
            losses = [*adapted.losses, loss]
            adapted = adapted._replace(losses=losses, gradient=gradient)
        return self.outcome(phi, adapted)

    def begin(self, phi: State) -> State:
        """Return φ as every task starts from it, in memory of its own, for `step_`."""
        state, count = self._spread(phi), len(phi.params)
        still = set(range(count)).difference(self.adapted)
        params = [t if i in still else self._laid_out(t) for i, t in enumerate(state.params)]
        moments = [
            t if i % count in still and i < self.rule.num_slots * count else self._laid_out(t)
            for i, t in enumerate(state.moments)
        ]
        buffers = [self._laid_out(t) for t in state.buffers]
        return State(params, buffers, moments, state.rates, state.learned)

    def at(self, state: State, step: int) -> State:
        """Return the state with the rates of one step in the place of all."""
        factors = None if state.rates is None else state.rates[step]
        learned = self.inner.learned_rates
        if learned is None:
            return state._replace(rates=factors)
        assert not isinstance(factors, Sequence)
        found = learned.at(state.learned, step, factors, state.params)
        return state._replace(rates=found, learned=())

    def step_(self, state: State, task: TensorDict, tensors: TensorDict) -> Tensor:
        """Do an inner step in place, so that there is never a second state; return the losses."""
        after, losses = self._step(task, state, tensors)
        for part, following in zip(state[:3], after[:3], strict=True):
            for tensor, value in zip(part, following, strict=True):
                if value is not tensor:
                    tensor.copy_(value)
        return losses

    def query_loss(self, state: State, task: TensorDict) -> Tensor:
        """Return the losses on the held-out data."""
        return self._loss(state, self._query, task)

    def outer_gradient(
        self, state: State, task: TensorDict, last: TensorDict
    ) -> tuple[Tensors, Tensor]:
        """Return ∇L(φ̃) of the query loss, and the losses; ``last`` is the last step's view."""
        every = tuple(range(len(state.params)))
        grads, losses, _ = self._gradients(state, *self._outer_target(task, last), every)
        return filled(grads, self._rows(state.params)), losses

    def pull_back(
        self, before: State, task: TensorDict, tensors: TensorDict, adjoint: State
    ) -> tuple[Tensors, Tensors, Tensors]:
        """Return the adjoint of what an inner step began with, from that of what came of it.

        Args:
            before: what it began with, at the rates of the step.
            task: the task's tensors.
            tensors: its view's.
            adjoint: of parameters and moments, without the counts.

        Returns:
            The adjoint of parameters, of moments, and of the rates if they are learned.
        """
        split = self.rule.num_slots * len(before.params)
        learns = self.inner.learned_rates is not None
        rates = [r for r in before.rates or [] if r is not None] if learns else []

        def step(params: Tensors, moments: Tensors, rates: Tensors) -> tuple[Tensors, Tensors]:
            moments = [*moments, *before.moments[split:]]
            start = before._replace(params=params, moments=moments)
            if learns:
                each: list[Tensor | None] = [None] * len(params)
                for place, rate in zip(self.adapted, rates, strict=True):
                    each[place] = rate
                start = start._replace(rates=each)
            after, _ = self._step(task, start, tensors)
            return after.params, after.moments[:split]

        given = self._rows(before.params), before.moments[:split], rates
        pull: Callable[..., Any] = vjp(step, *given)[1]
        found: tuple[Tensors, Tensors, Tensors] = pull((adjoint.params, adjoint.moments))
        return found

    def outcome(self, phi: State, adapted: Adapted) -> TrainOutput:
        """Return the means over the tasks of what the algorithm gives, and of what goes with it."""
        algorithm, after = self.inner.algorithm, adapted.state
        give: Callable[..., Tensors] = partial(given, algorithm)
        if self.num_tasks is not None:
            give = vmap(give, in_dims=(None, 0, 0, 0), randomness="different")
        of_learned = self.inner.learned.those_learned
        rates = self.rates_of_tasks(phi)
        path = [[*of_learned(self._rows(params)), *rates] for params in adapted.path]
        gradient = of_learned(adapted.gradient) if adapted.gradient else []
        gradient += adapted.gradient_of_rates
        start = [*of_learned(phi.params), *phi.learned]
        each = give(start, [*of_learned(self._rows(after.params)), *rates], path, gradient)
        curves = torch.stack(adapted.losses)
        # by rows also where there is one: Inductor has no code of `torch._foreach_norm`
        rows = each if self.num_tasks is not None else [t.unsqueeze(0) for t in each]
        norms = norm(rows, stacked=True)
        kept = curves.isfinite().all(0) & norms.isfinite()
        split = self.rule.num_slots * len(phi.params)
        moments = self._means(after.moments[:split], kept, phi.weights)
        moments += [count.clone() for count in after.moments[split:]]
        mean = self._means(each, kept, phi.weights)
        count = len(self.inner.learned.buffers)
        moved = movements(after.buffers[:count], phi.buffers[:count])
        way = algorithm.meta_gradient(start, mean)
        distance = norm([t.unsqueeze(0) for t in way], stacked=True)
        figures = [curves.flatten(), norms.flatten(), distance.flatten()]
        return TrainOutput(
            mean,
            self._means(moved, kept, phi.weights),
            self._last(after.buffers[count:], kept, phi.weights),
            moments,
            torch.cat([f.to(curves.dtype) for f in figures]),
        )

    def _after(self, state: State, task: TensorDict, steps: Sequence[TensorDict]) -> Adapted:
        """Return the state after all steps, the losses before each, and the way there."""
        losses, trajectory = [], self.inner.algorithm.trajectory
        path = [state.params] if trajectory else []
        for step, tensors in enumerate(steps):
            after, loss = self._step(task, self.at(state, step), tensors)
            state = after._replace(rates=state.rates, learned=state.learned)
            losses.append(loss)
            if trajectory:
                path.append(state.params)
        return Adapted(state, losses, path, [])

    def _through_steps(
        self, start: State, task: TensorDict, steps: Sequence[TensorDict]
    ) -> Adapted:
        """Return the gradient at φ of the query loss after all steps, and what led to it."""

        def after_all(params: Tensors, learned: Tensors) -> tuple[Tensor, Any]:
            first = start._replace(params=params, learned=learned)
            adapted = self._after(first, task, steps)
            loss = self._loss(adapted.state, *self._outer_target(task, steps[-1]))
            # tensors alone: what `grad` passes through beside a result must not be None
            return loss.sum(), (adapted.state[:3], [*adapted.losses, loss], adapted.path)

        given = self._rows(start.params), self.rates_of_tasks(start)
        function = grad(after_all, argnums=(0, 1), has_aux=True)
        (gradient, of_rates), (end, losses, path) = function(*given)
        return Adapted(State(*end), losses, path, gradient, of_rates)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """Return a copy: of convolutions' weights on the CPU with the channels last.

        So `patches_product` reads them and makes their gradient.
        """
        own_dims = tensor.dim() - (self.num_tasks is not None)
        if own_dims == 4 and self.device_type == "cpu":
            moved = tensor.movedim(-3, -1)
            return moved.clone(memory_format=torch.contiguous_format).movedim(-1, -3)
        return tensor.clone(memory_format=torch.contiguous_format)

    def _step(self, task: TensorDict, state: State, tensors: TensorDict) -> tuple[State, Tensor]:
        """Return the state after one inner step, and the loss before it."""
        seen = task if self.view is None else tensors
        grads, loss, buffers = self._gradients(state, self._seen, seen, self.used)
        if self.inner.clip is not None:
            grads = list(clipped(grads, self.inner.clip, stacked=self.num_tasks is not None))
        params, moments = self.rule.step(
            *(grads, state.params, state.moments, state.rates),
            first_order=self.inner.through_steps and not self.inner.algorithm.second_order,
        )
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

        rows = self._rows(state.params)

        def total(learning: Tensors, *others: Any) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            losses, moved = self._mapped(loss_of, dims)(learning, *others)
            return losses.sum(), (losses, moved)

        given = [rows[index] for index in used], state.params, state.buffers, tensors
        dims = 0, self._rows_of(state.params), 0, 0
        if self.inner.algorithm.second_order:
            # vmap inside of both derivatives: torch 2.13 gets second derivatives of affine
            # normalisations wrong in grad(vmap(grad(…)))
            found, (loss, moved) = grad(total, has_aux=True)(*given)
        else:
            function = grad_and_value(loss_of, has_aux=True)
            found, (loss, moved) = self._mapped(function, dims)(*given)
        grads: list[Tensor | None] = [None] * len(state.params)
        for index, gradient in zip(used, found, strict=True):
            grads[index] = gradient
        return grads, loss, moved

    def _loss(self, state: State, target: Target, tensors: TensorDict) -> Tensor:
        def loss_of(params: Tensors, buffers: Tensors, tensors: TensorDict) -> Tensor:
            return self._one_loss(params, buffers, target, tensors)[0]

        dims = self._rows_of(state.params), 0, 0
        losses: Tensor = self._mapped(loss_of, dims)(state.params, state.buffers, tensors)
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

    def _outer_target(self, task: TensorDict, last: TensorDict) -> tuple[Target, TensorDict]:
        """Return what the query loss is of, as `koi.tasks.outer_view` does."""
        if has(self.task, "query"):
            return self._query, task
        if self.view is None:
            return self._seen, task
        return self._seen, last

    def _mapped(self, function: Callable[..., Any], dims: Any) -> Callable[..., Any]:
        if self.num_tasks is None:
            return function
        return vmap(function, in_dims=dims, randomness="different")

    @property
    def adapted(self) -> list[int]:
        """The places of the parameters that the inner loop moves."""
        names = self.inner.learned
        return names.those_adapted(range(len(names.params)))

    def _rows(self, params: Tensors) -> Tensors:
        """Return the parameters with a row for each task, also where all tasks share one tensor."""
        if self.num_tasks is None or self.inner.learned.adapted is None:
            return params
        pairs = zip(params, self._rows_of(params), strict=True)
        return [p.expand(self.num_tasks, *p.shape) if dim is None else p for p, dim in pairs]

    def _rows_of(self, params: Tensors) -> list[int | None]:
        """Return the dimension of the tasks of each parameter; None where all share one tensor."""
        pairs = zip(params, self.num_dims, strict=True)
        return [None if p.dim() == num_dims else 0 for p, num_dims in pairs]

    def rates_of_tasks(self, phi: State) -> Tensors:
        """Return the learned rates, with a row for each task where many run at once."""
        if self.num_tasks is None:
            return list(phi.learned)
        return [rate.expand(self.num_tasks, *rate.shape) for rate in phi.learned]

    def _spread(self, phi: State) -> State:
        """Return φ as every task starts from it."""
        if self.num_tasks is None:
            return phi
        split = self.rule.num_slots * len(phi.params)
        rows = [
            [t.expand(self.num_tasks, *t.shape) for t in group]
            for group in (phi.params, phi.buffers, phi.moments[:split])
        ]
        for i in set(range(len(phi.params))).difference(self.adapted):
            rows[0][i] = phi.params[i]
        return State(rows[0], rows[1], rows[2] + phi.moments[split:], phi.rates, phi.learned)

    def _last(self, tensors: Tensors, kept: Tensor, weights: Tensor | None) -> Tensors:
        """Return those of the last task that is kept and counts."""
        if self.num_tasks is None:
            return [t.clone() for t in tensors]
        if weights is not None:
            kept = kept & (weights > 0)
        elif not self.inner.skip_nonfinite:
            return [t[-1].clone() for t in tensors]
        last = (torch.arange(self.num_tasks, device=kept.device) * kept).max().reshape(1)
        return [t.index_select(0, last)[0] for t in tensors]

    def _means(self, tensors: Tensors, kept: Tensor, weights: Tensor | None) -> Tensors:
        if self.num_tasks is None:
            return [t.contiguous() for t in tensors]
        if not self.inner.skip_nonfinite:
            return [mean_of(t, weights).contiguous() for t in tensors]
        rows = [kept.reshape(-1, *[1] * (t.dim() - 1)) for t in tensors]
        those = [torch.where(row, t, 0) for row, t in zip(rows, tensors, strict=True)]
        if weights is not None:
            weights = torch.where(kept, weights, 0)
            return [mean_of(t, weights).contiguous() for t in those]
        return [(t.sum(0) / kept.sum()).contiguous() for t in those]
