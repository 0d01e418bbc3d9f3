"""The inner loop in the plainest way there is, which every engine is compared with.

A deep copy of the module, the user's own loss, the optimizer as the factory makes it, torch's own
backward: what a user would write after reading the paper, and nothing that is clever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koi.algorithms import given
from koi.errors import ModelError
from koi.inner.base import InnerLoop, scalar
from koi.inner.optimizers.rules import make_optimizer
from koi.phi.arithmetic import Tensors, clone
from koi.phi.learned import copy_module
from koi.phi.rates import StepRates
from koi.randomness import Place, capture, same_states
from koi.tasks import outer_view, query_of, views


@dataclass
class Plain:
    """Adapts to one task after the other.

    Args:
        model: the user's module.
        inner: the settings of the inner loop.
        purpose: what is asked for: what the algorithm gives of a task ("train"; where it is of
            second order nothing but the query loss), φ̃ ("measure"), or the query losses before and
            after each step ("evaluate").
        num_steps: inner steps.
        place: where this is, for the draws.
        rates: what multiplies each parameter's rate at each step; None: 1.
        together: whether losses draw as those of tasks that run at once do.
        steps: whether the optimizer steps at all.
        noisy: whether a loss has drawn at random.
        draws: whether minibatches of tasks that run at once have.
    """

    model: nn.Module
    inner: InnerLoop
    purpose: str
    num_steps: int
    place: Place
    rates: Tensor | None
    together: bool
    steps: bool = True
    noisy: bool = False
    draws: bool = False

    @torch.enable_grad()
    def __call__(self, start: Sequence[Tensor], task: Any, number: int) -> tuple[Tensors, float]:
        """Return what is asked for, and the last loss, from ``start``.

        Args:
            start: the parameters, and the learned rates.
            task: the task.
            number: its number in the meta-batch.

        Raises:
            ModelError: the loss reaches the user's module in the place of the copy it is given.
        """
        model = self._copied(self.model)
        params = self.inner.learned.params_of(model)
        learned_rates = start[len(params) :]
        with torch.no_grad():
            for param, value in zip(params, start, strict=False):
                param.copy_(value)
        optimizer = make_optimizer(self.inner.factory, params, self.inner.step_size)
        view, loss = task, torch.zeros(())
        steps = self._views(task, number)
        curve = [self._measured(task, model, 0)]
        trajectory = self.inner.algorithm.trajectory
        path = [clone(params)] if trajectory else []
        directions: list[Tensors] = []
        for step, view in enumerate(steps):
            loss = self._loss(view, model, step)
            if step == 0:
                self._check_reach(loss)
            optimizer.zero_grad()
            for param, grad in zip(params, _gradients(loss, params), strict=True):
                param.grad = grad
            if self.inner.clip is not None:
                adapted = self.inner.learned.those_adapted(params)
                nn.utils.clip_grad_norm_(adapted, self.inner.clip)
            if self.steps:
                directions.append(self._step(optimizer, params, self._rates(learned_rates, step)))
            curve.append(self._measured(task, model, step + 1))
            if trajectory:
                path.append(clone(params))
        if self.purpose == "evaluate":
            return [torch.stack(curve)], loss.item()
        if self.purpose == "measure":
            return clone(params), loss.item()
        algorithm, gradient = self.inner.algorithm, []
        if algorithm.query_gradient:
            loss = self._loss(outer_view(task, view), model, self.num_steps)
            if algorithm.second_order:
                return [], loss.item()
            pairs = zip(params, _gradients(loss, params), strict=True)
            gradient = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in pairs]
        of_learned = self.inner.learned.those_learned
        of_rates = self._slopes(learned_rates, directions, gradient)
        path = [[*of_learned(p), *learned_rates] for p in path]
        gradient = [*of_learned(gradient), *of_rates] if gradient else []
        with torch.no_grad():
            begin = [*of_learned(start[: len(params)]), *learned_rates]
            end = [*of_learned(clone(params)), *learned_rates]
            return given(algorithm, begin, end, path, gradient), loss.item()

    def _rates(self, learned: Sequence[Tensor], step: int) -> StepRates:
        factors = None if self.rates is None else self.rates[step]
        if self.inner.learned_rates is None:
            return factors
        like = self.inner.learned.params_of(self.model)
        return self.inner.learned_rates.at(learned, step, factors, like)

    def _step(self, optimizer: torch.optim.Optimizer, params: Tensors, rates: StepRates) -> Tensors:
        """Step, and return how far a rate of 1 would have gone."""
        before = clone(params)
        optimizer.step()
        with torch.no_grad():
            directions = [param - old for param, old in zip(params, before, strict=True)]
            if rates is None:
                return directions
            for param, old, way, rate in zip(params, before, directions, rates, strict=True):
                if rate is not None:
                    param.copy_(old + rate * way)
        return directions

    def _slopes(
        self, learned: Sequence[Tensor], directions: list[Tensors], gradient: Tensors
    ) -> Tensors:
        """Return dL/dα of FOMAML's learned rates: ⟨∇L(φ̃), d_j⟩ for each step's direction d_j."""
        leaves = [rate.detach().requires_grad_() for rate in learned]
        if not leaves:
            return []
        total = torch.stack([rate.sum() for rate in leaves]).sum() * 0
        for step, ways in enumerate(directions):
            for rate, way, slope in zip(
                self._rates(leaves, step) or (), ways, gradient, strict=True
            ):
                total = total if rate is None else total + (rate * way * slope.conj()).sum().real
        return list(torch.autograd.grad(total, leaves))

    def _copied(self, model: nn.Module) -> nn.Module:
        """Return a deep copy; what nothing moves is not copied."""
        return copy_module(model, {id(p): p for p in self.inner.learned.others_of(model).values()})

    def _measured(self, task: Any, model: nn.Module, step: int) -> Tensor:
        """Return the query loss, where that is asked for, of a copy."""
        if self.purpose != "evaluate":
            return torch.zeros(())
        return self._loss(query_of(task), self._copied(model), step).detach()

    def _views(self, task: Any, number: int) -> Iterable[Any]:
        """Return what each step sees, the generators set as the engine's are."""
        self.place.set("inner", number)
        if not self.together:
            return views(task, self.num_steps)
        before = capture()
        steps = list(views(task, self.num_steps))
        self.draws = not same_states(before, capture())
        self.place.set("inner loss" if self.draws else "inner", None)
        return steps

    def _loss(self, view: Any, model: nn.Module, step: int) -> Tensor:
        before = capture()
        with self.inner.precision(next(model.parameters()).device):
            loss = scalar(view.loss(model), view, step)
        self.noisy = self.noisy or not same_states(before, capture())
        return loss

    def _check_reach(self, loss: Tensor) -> None:
        """Check that no gradient arrives at the module that the user gave."""
        if not loss.requires_grad:
            return
        learned = self.inner.learned
        own = learned.params_of(self.model)
        grads = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
        reached = [n for n, g in zip(learned.params, grads, strict=True) if g is not None]
        if reached:
            raise ModelError(
                f"the loss reaches {', '.join(reached)} of the module that Koi was given, and not "
                "of the copy that loss(model) receives, through a closure, a lambda or a "
                "reference: take parameters from `model` and, inside of a module, from `self`"
            )


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, params, allow_unused=True)
