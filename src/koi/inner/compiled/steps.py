"""What is called to run a chunk of tasks: one graph, or the graphs of single steps in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from koi.inner.compiled.compiler import AsItStands, Graph
from koi.inner.compiled.functions import InnerFunctions, TensorDict
from koi.inner.compiled.torch_internals import at_fixed_address
from koi.inner.compiled.values import Adapted, State, TrainOutput
from koi.phi.arithmetic import Tensors, clone

MakeGraph = Callable[[Callable[..., Any], str], Graph | AsItStands]


@dataclass(frozen=True)
class Program:
    """Something to call, and the graphs that it calls."""

    run: Callable[..., Any]
    graphs: tuple[Graph | AsItStands, ...]

    @property
    def threadsafe(self) -> bool:
        """Whether nothing is left to be compiled, which touches the user's module."""
        return all(graph.threadsafe for graph in self.graphs)


class StepGraphs:
    """The inner loop as graphs of one step, of the query loss and of its gradient.

    The steps are done in place: memory holds each task's state once. What is compiled for one
    number of steps, or for evaluation, serves every other.

    Args:
        pure: the functions that are compiled.
        make: makes a graph of a function and of what the log calls it.
    """

    def __init__(self, pure: InnerFunctions, make: MakeGraph) -> None:
        self._pure = pure
        self._step = make(pure.step_, "an inner step")
        self._query = make(pure.query_loss, "the query loss")
        self._outer = make(pure.outer_gradient, "the query gradient")
        self._pull = make(pure.pull_back, "an inner step backwards")
        self._fixed: State | None = None

    def program(self, purpose: str) -> Program:
        """Return what to call to "train", "evaluate" or "adapt"."""
        if purpose == "evaluate":
            return Program(self.evaluate, (self._step, self._query))
        if purpose == "train" and self._pure.inner.through_steps:
            return Program(self.train, (self._step, self._outer, self._pull))
        if purpose == "train" and self._pure.inner.algorithm.query_gradient:
            return Program(self.train, (self._step, self._outer))
        return Program(getattr(self, purpose), (self._step,))

    @torch.no_grad()
    def train(self, phi: State, task: TensorDict, steps: Sequence[TensorDict]) -> TrainOutput:
        """Return what a meta-batch gives."""
        state, algorithm = self._begin(phi), self._pure.inner.algorithm
        path = [clone(state.params)] if algorithm.trajectory else []
        losses, kept = [], []
        for step, tensors in enumerate(steps):
            if self._pure.inner.through_steps:
                params, buffers, moments = map(clone, state[:3])
                kept.append(state._replace(params=params, buffers=buffers, moments=moments))
            # a CUDA graph writes its next results over the last ones
            losses.append(self._step(self._pure.at(state, step), task, tensors).clone())
            if algorithm.trajectory:
                path.append(clone(state.params))
        gradient: Tensors = []
        of_rates: Tensors = []
        if algorithm.query_gradient:
            gradient, loss = self._outer(state, task, steps[-1])
            losses.append(loss)
        if self._pure.inner.through_steps:
            gradient, of_rates = self._back(kept, task, steps, gradient)
        return self._pure.outcome(phi, Adapted(state, losses, path, gradient, of_rates))

    @torch.no_grad()
    def evaluate(self, phi: State, task: TensorDict, steps: Sequence[TensorDict]) -> Tensor:
        """Return the query losses before and after each step, shape (steps + 1[, tasks])."""
        state = self._begin(phi)
        losses = [self._query(state, task).clone()]
        for step, tensors in enumerate(steps):
            self._step(self._pure.at(state, step), task, tensors)
            losses.append(self._query(state, task).clone())
        return torch.stack(losses)

    @torch.no_grad()
    def adapt(self, phi: State, task: TensorDict, steps: Sequence[TensorDict]) -> Tensors:
        """Return each task's parameters and buffers after the steps, in one list."""
        state = self._begin(phi)
        for step, tensors in enumerate(steps):
            self._step(self._pure.at(state, step), task, tensors)
        return [*state.params, *state.buffers]

    def _back(
        self, kept: list[State], task: TensorDict, steps: Sequence[TensorDict], adjoint: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return dL/dφ from dL/dφ̃, each step computed once more (`koi.inner.second_order`).

        Beside it that of the learned rates.
        """
        learned, count = self._pure.inner.learned_rates, self._pure.rule.num_slots * len(adjoint)
        of_moments = [torch.zeros_like(m) for m in kept[0].moments[:count]]
        rates = self._pure.rates_of_tasks(kept[0])
        of_rates = [torch.zeros_like(rate) for rate in rates]
        for step in reversed(range(len(steps))):
            before, at = kept.pop()._replace(learned=rates), State(adjoint, [], of_moments)
            pulled = self._pull(self._pure.at(before, step), task, steps[step], at)
            adjoint, of_moments, of_step = (clone(part) for part in pulled)
            if learned is not None:
                factors = None if before.rates is None else before.rates[step]
                parts = learned.pulled(rates, step, factors, before.params, of_step)
                torch._foreach_add_(of_rates, parts)
        return adjoint, of_rates

    def _begin(self, phi: State) -> State:
        """Return the state before the first step."""
        start = self._pure.begin(phi)
        if self._pure.device_type == "cpu":
            return start
        # a CUDA graph changes its inputs in place only where they always have the same addresses
        if self._fixed is None:
            self._fixed = start
            for tensor in chain(*start[:3]):
                at_fixed_address(tensor)
        else:
            for fixed, value in zip(chain(*self._fixed[:3]), chain(*start[:3]), strict=True):
                fixed.copy_(value)
        return self._fixed._replace(rates=start.rates, learned=start.learned)
