"""The inner loop compiled: of all tasks at once, or of one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from koi.errors import EngineError
from koi.inner.base import InnerLoop, Metric, explained, finite_tasks, metrics_of
from koi.inner.compiled.compiler import AsItStands, Graph
from koi.inner.compiled.graphs import Graphs, Job
from koi.inner.compiled.layers import layers_as_products
from koi.inner.compiled.values import State
from koi.inner.compiled.workers import Call, Workers
from koi.inner.layers.embedding import map_padding
from koi.inner.layers.normalisation import map_normalisation, map_weight_norm
from koi.inner.layers.recurrence import map_recurrence
from koi.inner.optimizers.moments import check_moments
from koi.inner.working import WorkingCopy
from koi.phi.arithmetic import Tensors, clone
from koi.phi.outcome import Outcome, OutcomeMean, Phi
from koi.randomness import Place
from koi.tasks import TaskBatch


class CompiledEngine:
    """Runs graphs that ``torch.compile`` made of the inner loop, or of one step of it.

    On the CPU several graphs of one task run side by side (`Workers`).
    """

    def __init__(
        self,
        model: nn.Module,
        inner: InnerLoop,
        *,
        mode: bool | str,
        together: bool,
        chunk_size: int | None,
        make: Callable[..., Graph | AsItStands] = Graph,
    ) -> None:
        if inner.rule is None:
            raise EngineError(
                "compile=True has the optimizer inside the graph, which works for torch.optim's "
                "SGD (no dampening) and, where no parameter is complex, Adam and AdamW (no "
                "amsgrad): choose one of these, or compile=False"
            )
        if inner.scale is not None:
            raise EngineError(
                "float16 has a loss scale that changes as it runs, which a compiled inner loop "
                "cannot follow: use autocast=torch.bfloat16, or compile=False"
            )
        self.inner = inner
        self.rule = inner.rule
        self._model, self._mode = model, mode
        self.together = together
        self.device = inner.learned.params_of(model)[0].device
        self.copy = WorkingCopy(model, inner.learned, prepare=self._prepare)
        self._shapes = inner.rule.shapes(self.copy.params)
        self._chunk_size = chunk_size
        self._evaluation_rows: int | None = None
        self._graphs = Graphs(self.copy, inner, inner.rule, mode, together, make)
        self._workers: dict[tuple[str, int], Workers | None] = {}

    def uncompiled(self) -> CompiledEngine:
        """Return the same computation without the compiler, whose draws are torch's own."""
        return CompiledEngine(
            self._model,
            self.inner,
            mode=self._mode,
            together=self.together,
            chunk_size=self._chunk_size,
            make=AsItStands,
        )

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task: all in one call, or each chunk or task in its own."""
        size = self._rows(len(batch))
        # a CUDA graph writes its next results over the last ones, so that they must be copied
        whole = size >= len(batch) and self.device.type == "cpu"
        means = OutcomeMean()
        with closing(self._results("train", phi, batch, size, num_steps, place)) as results:
            for call, output in results:
                with explained(place, call.first, call.count):
                    *figures, distance = output.figures.tolist()
                    rows = [figures[row : -call.count : call.count] for row in range(call.count)]
                    norms, skip = figures[-call.count :], self.inner.skip_nonfinite
                    kept = finite_tasks(rows, norms, call.first, place, skip)
                    losses = [rows[row] for row in kept]
                    weights = batch.weights_of(call.first - batch.first + row for row in kept)
                if whole and sum(weights) > 0:
                    constants, skipped = clone(output.constants), len(batch) - len(losses)
                    parts = output.given, output.buffers, constants, output.moments
                    return Outcome(*parts, losses, skipped, distance, weights)
                if losses:
                    parts = output.given, output.buffers, output.constants, output.moments
                    means.add(*parts, losses, weights)
        return means.outcome(len(batch), distance if size >= len(batch) else None)

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step, shape (tasks, steps + 1)."""
        size = self._first_rows(len(batch))
        return torch.cat(
            [
                curve.reshape(num_steps + 1, -1).t()[: call.count]
                for call, curve in self._results("evaluate", phi, batch, size, num_steps, place)
            ]
        )

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensors:
        """Return ``metric(adapted module, task)`` of each task that is not skipped."""
        size = self._first_rows(len(batch))
        values: Tensors = []
        with closing(self._results("adapt", phi, batch, size, num_steps, place)) as results:
            for call, tensors in results:
                with explained(place, call.first, call.count):
                    start = call.first - batch.first
                    for row, task in enumerate(batch.tasks[start : start + call.count]):
                        rows = [t[row] for t in tensors] if self.together else tensors
                        self.copy.begin(phi)
                        self.inner.learned.put(self.copy.module, rows)
                        number, model = call.first + row, self.copy.module
                        values += metrics_of(metric, model, task, self.inner, number, place)
        return values

    def _results(
        self, purpose: str, phi: Phi, batch: TaskBatch, size: int, num_steps: int, place: Place
    ) -> Generator[tuple[Call, Any]]:
        """Yield a call for every ``size`` tasks, in their order, and what its program gives."""
        if phi.moments is None:
            moments = self.rule.initial(phi.params)
        else:
            moments = phi.moments
            check_moments(moments, self._shapes)
        buffers, learned = [*phi.buffers, *phi.constants], phi.learned_rates
        start = State(phi.params, buffers, moments, phi.rates, learned)
        workers = self._workers_for(purpose, len(batch))
        calls = (
            self._graphs.call(
                Job(
                    purpose,
                    chunk if purpose == "train" else chunk.filled(size),
                    len(chunk),
                    num_steps,
                    place,
                    first,
                ),
                start,
                workers,
            )
            for first, chunk in batch.chunks(size)
        )
        return workers.run(calls) if workers else ((call, call()) for call in calls)

    def _prepare(self, module: nn.Module) -> None:
        if self.device.type == "cpu":
            layers_as_products(module, together=self.together)
        if self.together:
            map_normalisation(module, self.inner.autocast is not None, join=False)
        map_recurrence(module, kernel=False)
        map_padding(module)
        if self.inner.algorithm.second_order:
            map_weight_norm(module)

    def _rows(self, num_tasks: int) -> int:
        """Return how many tasks a graph is for."""
        return self._chunk_size or num_tasks if self.together else 1

    def _first_rows(self, num_tasks: int) -> int:
        """Return for how many tasks the graphs of evaluation are made: as many as at first."""
        if self._evaluation_rows is None:
            self._evaluation_rows = self._rows(num_tasks)
        return self._evaluation_rows

    def _workers_for(self, purpose: str, num_tasks: int) -> Workers | None:
        """Return threads that share the tasks, where at first there were several of both.

        It is left at that, so that no graph is compiled again for another number of tasks.
        """
        total = torch.get_num_threads()
        if (purpose, total) not in self._workers:
            count = min(num_tasks, total, self._chunk_size or total)
            alone = self.together or self.device.type != "cpu" or count < 2
            self._workers[purpose, total] = None if alone else Workers(count)
        return self._workers[purpose, total]
