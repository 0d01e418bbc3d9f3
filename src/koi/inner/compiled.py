"""The inner loop as one compiled graph: of all tasks at once, or of one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koi import parameters
from koi.errors import EngineError
from koi.inner.base import (
    InnerLoop,
    Metric,
    depends_on_model,
    drawn_views,
    explained,
    finite_tasks,
    measured,
    scalar,
)
from koi.inner.compiler import Graph
from koi.inner.functional import PureLoss
from koi.inner.graph import InnerGraph, State, TensorDict, TrainOutput
from koi.inner.normalisation import map_normalisation
from koi.inner.products import layers_as_products
from koi.parameters import Modes
from koi.randomness import Place, capture, restore, same_host_draws, same_states
from koi.state import Outcome, OutcomeMean, Phi
from koi.tasks import TaskBatch, field_names, query_of, stack, tensors_of, views


class CompiledEngine:
    """Runs graphs that ``torch.compile`` made of the whole inner loop.

    Each graph serves one combination of shapes, types, modes and settings, which is looked up here
    at every call.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: InnerLoop,
        *,
        mode: bool | str,
        together: bool,
        chunk_size: int | None,
    ) -> None:
        if inner.rule is None:
            raise EngineError(
                "compile=True has the optimizer inside the graph, which works for torch.optim's "
                "SGD (no dampening), Adam and AdamW (no amsgrad): choose one of these, or "
                "compile=False"
            )
        if inner.scale is not None:
            raise EngineError(
                "float16 has a loss scale that changes as it runs, which a compiled inner loop "
                "cannot follow: use autocast=torch.bfloat16, or compile=False"
            )
        self.inner = inner
        self.rule = inner.rule
        self.model = parameters.copy_module(model)
        self.modes = Modes(self.model, like=model)
        self.device = inner.learned.params_of(model)[0].device
        if self.device.type == "cpu":
            layers_as_products(self.model)
        if together:
            map_normalisation(self.model, inner.autocast is not None, join=False)
        self.together = together
        self._mode = mode
        self._chunk_size = chunk_size if together else 1
        self._evaluation_chunk: int | None = None
        self._pure = PureLoss(self.model, inner.learned)
        self._plans: dict[Any, Plan] = {}
        self._graphs: dict[Any, Graph] = {}

    def meta_batch(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Outcome:
        """Adapt to every task: by one graph call, or by one for each chunk or task."""
        self.modes.match()
        start = self._state(phi)
        size = self._chunk_size or len(batch)
        # a CUDA graph writes its next results over the last ones, so that they must be copied
        means = OutcomeMean(copy=size < len(batch) or self.device.type == "cuda")
        for first, chunk in batch.chunks(size):
            with explained(place, first, len(chunk)):
                place.set("inner", (first or None) if self.together else first)
                output = self._train(start, chunk, num_steps, place, first)
                *figures, distance = output.figures.tolist()
                count = len(chunk)
                rows = [figures[row:-count:count] for row in range(count)]
                kept = finite_tasks(rows, figures[-count:], first, place, self.inner.skip_nonfinite)
                losses = [rows[row] for row in kept]
            if losses:
                params, buffers, moments = output.means
                means.add(params, buffers, moments, losses)
        return means.outcome(len(batch), distance if size >= len(batch) else None)

    def evaluate(self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place) -> Tensor:
        """Return each task's query loss before and after each step, shape (tasks, steps + 1)."""
        curves = []
        for _, chunk, curve in self._over_chunks("evaluate", phi, batch, num_steps, place):
            curves.append(curve.reshape(num_steps + 1, -1).t()[: len(chunk)])
        return torch.cat(curves)

    def measure(
        self, phi: Phi, batch: TaskBatch, num_steps: int, place: Place, metric: Metric
    ) -> Tensor:
        """Return ``metric(adapted module, task)`` of each task, shape (tasks, …)."""
        values = []
        for first, chunk, tensors in self._over_chunks("adapt", phi, batch, num_steps, place):
            with explained(place, first, len(chunk)):
                for row, task in enumerate(chunk.tasks):
                    rows = [t[row] for t in tensors] if self.together else tensors
                    self.inner.learned.put(self.model, rows)
                    values.append(measured(metric, self.model, task))
        return torch.stack(values)

    def _over_chunks(
        self, purpose: str, phi: Phi, batch: TaskBatch, num_steps: int, place: Place
    ) -> Iterator[tuple[int, TaskBatch, Any]]:
        """Yield chunks, the number of their first task, and what the graph makes of them.

        The graph is made for one number of tasks; a smaller last chunk is filled up with its own
        first task.
        """
        self.modes.match()
        start = self._state(phi)
        if self._evaluation_chunk is None:
            self._evaluation_chunk = self._chunk_size or len(batch)
        for first, chunk in batch.chunks(self._evaluation_chunk):
            with explained(place, first, len(chunk)):
                place.set("inner", (first or None) if self.together else first)
                full = chunk.filled(self._evaluation_chunk)
                result = self._after_steps(purpose, start, full, num_steps, place, first)
            yield first, chunk, result

    def _train(
        self, start: State, chunk: TaskBatch, num_steps: int, place: Place, first: int
    ) -> TrainOutput:
        task, plan = self._tensors(chunk), self._plan(chunk, num_steps)
        steps = self._drawn(chunk, num_steps, place, first) if plan.draws else None
        key = ("train", num_steps, plan.key, self._signature(task, steps))
        if key not in self._graphs:
            graph = plan.graph

            def train(start: State, task: TensorDict, steps: TensorDict | None) -> TrainOutput:
                views = graph.prepare(task, num_steps) if steps is None else steps
                with graph.attention():
                    return graph.train(start, task, views)

            self._graphs[key] = self._graph(train, plan)
        output: TrainOutput = self._graphs[key](start, task, steps)
        return output

    def _after_steps(
        self,
        purpose: str,
        start: State,
        chunk: TaskBatch,
        num_steps: int,
        place: Place,
        first: int,
    ) -> Any:
        """Run the graph of `InnerGraph.evaluate` or of `InnerGraph.adapt`."""
        task, plan = self._tensors(chunk), self._plan(chunk, num_steps)
        if plan.draws and num_steps > 0:
            steps = self._drawn(chunk, num_steps, place, first)
        else:
            steps = plan.graph.prepare(task, num_steps)
        one_step = {name: tensor[:1] for name, tensor in steps.items()}
        static = num_steps if num_steps < 2 else None
        key = (purpose, static, plan.key, self._signature(task, one_step))
        if key not in self._graphs:
            graph, method = plan.graph, getattr(plan.graph, purpose)

            def after_steps(start: State, task: TensorDict, steps: TensorDict) -> Any:
                with graph.attention():
                    return method(start, task, steps)

            self._graphs[key] = self._graph(after_steps, plan)
            if static is None:
                for tensor in steps.values():
                    torch._dynamo.mark_dynamic(tensor, 0)
        return self._graphs[key](start, task, steps)

    def _state(self, phi: Phi) -> State:
        moments = self.rule.initial(phi.params) if phi.moments is None else phi.moments
        return State(phi.params, [*phi.buffers, *phi.constants], moments)

    def _tensors(self, chunk: TaskBatch) -> TensorDict:
        return tensors_of(chunk.stacked if self.together else chunk.tasks[0])

    def _drawn(self, chunk: TaskBatch, num_steps: int, place: Place, first: int) -> TensorDict:
        """Return the tensors of minibatches that are drawn at random, task by task."""
        each = drawn_views(chunk, num_steps, place, first)
        stacked = [stack(step) for step in zip(*each, strict=True)] if self.together else each[0]
        rows = [tensors_of(view) for view in stacked]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _plan(self, chunk: TaskBatch, num_steps: int) -> Plan:
        """Return how tasks of this class and settings are traced, found out on the first."""
        example = chunk.example
        key = type(example), len(chunk) if self.together else None, settings_of(example)
        if key not in self._plans:
            self._plans[key] = self._make_plan(key, chunk, num_steps)
        return self._plans[key]

    def _make_plan(self, key: Any, chunk: TaskBatch, num_steps: int) -> Plan:
        task, before = chunk.tasks[0], capture()
        steps = views(task, max(num_steps, 1))
        draws = not same_states(before, capture())
        constant = all(view is task for view in steps)
        if len({(type(v), settings_of(v), shapes_of(v)) for v in steps}) > 1:
            raise EngineError(
                f"the minibatches of {type(task).__name__} differ in class, settings or shape: a "
                "compiled inner loop needs them alike; cycle through the data instead of ending "
                "with a smaller one, or use compile=False"
            )
        middle = capture()
        params = self.inner.learned.params_of(self.model)
        copies = [p.detach().clone().requires_grad_() for p in params]
        with torch.enable_grad(), self.inner.precision(params[0].device):
            loss = scalar(self._pure(copies, steps[0]), steps[0], 0)
            scalar(self._pure(copies, query_of(task)), query_of(task), num_steps)
        grads = torch.autograd.grad(depends_on_model(loss, steps[0], 0), copies, allow_unused=True)
        if not same_host_draws(middle, capture()):
            raise EngineError(
                "the loss draws from Python's or NumPy's random generator, which a compiled inner "
                "loop would do only once: draw from torch, or in sample(), or use compile=False"
            )
        restore(before)
        graph = InnerGraph(
            self._pure,
            self.inner,
            self.rule,
            used=tuple(i for i, g in enumerate(grads) if g is not None),
            task=task,
            view=None if constant else steps[0],
            num_tasks=len(chunk) if self.together else None,
            device_type=self.device.type,
        )
        return Plan(key, graph, draws)

    def _signature(self, task: TensorDict, steps: TensorDict | None) -> tuple[Any, ...]:
        """Return all that a graph takes for granted and that may change while the module stays."""
        tensors = task.values() if steps is None else [*task.values(), *steps.values()]
        forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        return forms, self.modes.values(), torch.get_num_threads()

    def _graph(self, function: Callable[..., Any], plan: Plan) -> Graph:
        return Graph(
            function,
            what="all tasks at once" if self.together else "one task",
            tasks=type(plan.graph.task).__name__,
            device=self.device.type,
            mode=self._mode,
        )


@dataclass(frozen=True)
class Plan:
    """How tasks of one class and settings are traced, and whether their minibatches draw."""

    key: Any
    graph: InnerGraph
    draws: bool


def settings_of(task: Any) -> tuple[Any, ...]:
    """Return the fields of a tensor task that are no tensors, so that they can be looked up.

    Raises:
        EngineError: one of them cannot.
    """
    values = []
    for name in field_names(type(task)):
        value = getattr(task, name)
        if isinstance(value, Tensor):
            continue
        try:
            values.append(hashable(value))
            hash(values[-1])
        except TypeError as error:
            raise EngineError(
                f"the field {name!r} of {type(task).__name__} is neither a tensor nor can it "
                "be looked up (it has no hash): make it a tensor or a tuple, or use compile=False"
            ) from error
    return tuple(values)


def hashable(value: Any) -> Any:
    """Return what is equal for equal values, lists and dictionaries among them."""
    if isinstance(value, list | tuple):
        return type(value), tuple(hashable(item) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, hashable(item)) for key, item in value.items())
    return value


def shapes_of(task: Any) -> tuple[Any, ...]:
    """Return the shapes and types of a tensor task's tensors."""
    return tuple((name, t.shape, t.dtype) for name, t in tensors_of(task).items())
