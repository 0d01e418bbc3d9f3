"""The graphs of a compiled engine, looked up by all that they take for granted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from koi.errors import EngineError
from koi.inner.base import InnerLoop, depends_on_model, drawn_views, explained, scalar
from koi.inner.checks.granted import ClassLook, ValuesLook
from koi.inner.compiled.compiler import AsItStands, Graph
from koi.inner.compiled.functions import InnerFunctions, TensorDict
from koi.inner.compiled.steps import Program, StepGraphs
from koi.inner.compiled.values import State
from koi.inner.compiled.workers import Call, Workers
from koi.inner.functional import PureLoss
from koi.inner.optimizers.rules import UpdateRule
from koi.inner.second_order import goes_step_by_step
from koi.inner.stepwise import explain
from koi.inner.working import WorkingCopy
from koi.phi.arithmetic import weights_like
from koi.randomness import Place, capture, restore, same_host_draws, same_states
from koi.tasks import (
    TaskBatch,
    check_fields,
    everything_of,
    query_of,
    settings_of,
    stack,
    tensors_of,
    unstack,
    views,
    with_tensors,
)

log = logging.getLogger("koi")

# Settings that tasks of one class may have: were there a graph for each value of one that differs
# from task to task, a training would compile for ever.
_MOST_SETTINGS = 8
# Inner steps times parameter tensors: up to here a graph with all steps compiles in seconds.
_MOST_WRITTEN_OUT = 64
# Parameters times numbers that a step sees, which bounds the products of one task's layers: up to
# here a second thread costs more than it does.
_MOST_ALONE = 2**20


@dataclass(frozen=True)
class Job:
    """What is asked of a program.

    Args:
        purpose: "train", "evaluate" or "adapt".
        chunk: the tasks that the program is for.
        count: how many of them count; the others fill the chunk up.
        num_steps: inner steps.
        place: where this is.
        first: the number of the first task.
    """

    purpose: str
    chunk: TaskBatch
    count: int
    num_steps: int
    place: Place
    first: int


class Graphs:
    """Makes a graph for each combination of shapes, types, modes and settings, and finds it again.

    Args:
        copy: the working copy of the module.
        inner: the settings of the inner loop.
        rule: the inner optimizer.
        mode: the argument ``compile`` of `koi.Koi`.
        together: whether a graph is of many tasks, stacked.
        make: what makes a graph of a function.
    """

    def __init__(
        self,
        copy: WorkingCopy,
        inner: InnerLoop,
        rule: UpdateRule,
        mode: bool | str,
        together: bool,
        make: Callable[..., Graph | AsItStands] = Graph,
    ) -> None:
        self._copy, self._params = copy, copy.params
        self._inner, self._rule = inner, rule
        self._mode, self._together, self._make = mode, together, make
        self._pure = PureLoss(copy.module, inner.learned)
        # each step through time is written out, in every inner step
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in copy.module.modules())
        self._looks: dict[type, tuple[ClassLook, ValuesLook]] = {}
        self._known: dict[Any, Traced] = {}
        self._told: set[type] = set()
        self._last: tuple[Any, Traced] | None = None  # equal keys are faster compared than hashed
        self._step_graphs: dict[Any, StepGraphs] = {}

    def call(self, job: Job, start: State, workers: Workers | None) -> Call:
        """Return a program and what it is called with, ``start`` first."""
        place, first, count = job.place, job.first, job.count
        with explained(place, first, count):
            place.set("inner", (first or None) if self._together else first)
            task = self._tensors(job.chunk)
            if self._together and job.chunk.weights is not None:
                start = start._replace(weights=weights_like(job.chunk.weights, start.params))
            forms = forms_of(task)
            traced = self._traced(job.chunk, forms, job.num_steps)
            shared = workers is not None and not traced.noisy
            threads = 1 if traced.light else torch.get_num_threads()
            threads = workers.num_threads if workers and shared else threads
            if self._in_one_graph(job, traced):
                program, steps = self._written_out(job, traced, threads)
            else:
                program, steps = self._step_by_step(job, task, forms, traced, threads)
        return Call(place, first, count, program, (start, task, steps), shared, threads)

    def _in_one_graph(self, job: Job, traced: Traced) -> bool:
        """Return whether one graph is of all steps.

        It is of a small network; of second order also where a step computed once more would draw
        otherwise.
        """
        if job.purpose != "train":
            return False
        size = job.num_steps * len(self._params)
        if self._inner.algorithm.second_order:
            return traced.noisy or not goes_step_by_step(self._inner, job.num_steps)
        return size <= _MOST_WRITTEN_OUT and not self._recurrent

    def _written_out(
        self, job: Job, traced: Traced, threads: int
    ) -> tuple[Program, list[TensorDict] | None]:
        """Return a graph of `InnerFunctions.train`, made for one number of steps."""
        num_steps = job.num_steps
        steps = self._drawn(job) if traced.draws else None
        key = (forms_of(*(steps or [])), threads, job.chunk.weights is None)
        if key not in traced.programs:
            functions = traced.functions

            def train(start: State, task: TensorDict, steps: list[TensorDict] | None) -> Any:
                views = functions.prepare(task, num_steps) if steps is None else steps
                return functions.train(start, task, views)

            made = self._graph(traced, train, "the inner loop", lean=False)
            traced.programs[key] = Program(made, (made,))
        return traced.programs[key], steps

    def _step_by_step(
        self, job: Job, task: TensorDict, forms: Any, traced: Traced, threads: int
    ) -> tuple[Program, list[TensorDict]]:
        """Return graphs of the parts of an inner step, for any number of them."""
        draws = traced.draws and job.num_steps > 0
        drawn = self._drawn(job) if draws else traced.functions.prepare(task, job.num_steps)
        steps = [{name: t.contiguous() for name, t in tensors.items()} for tensors in drawn]
        key = (traced.form, forms, forms_of(*steps[:1]), threads)
        graphs = self._step_graphs if traced.compiled else traced.programs
        if key not in graphs:
            graphs[key] = StepGraphs(traced.functions, partial(self._graph, traced, lean=True))
        return graphs[key].program(job.purpose), steps

    def _tensors(self, chunk: TaskBatch) -> TensorDict:
        return tensors_of(chunk.stacked if self._together else chunk.tasks[0])

    def _drawn(self, job: Job) -> list[TensorDict]:
        """Return the tensors of minibatches that are drawn at random, task by task."""
        each = drawn_views(job.chunk, job.num_steps, job.place, job.first)
        steps = [stack(step) for step in zip(*each, strict=True)] if self._together else each[0]
        return [tensors_of(view) for view in steps]

    def _traced(self, chunk: TaskBatch, forms: Any, num_steps: int) -> Traced:
        """Return how tasks like these are traced, found out on the first of them.

        What its minibatches and its loss do may depend on its class, settings and shapes.
        """
        example, size = chunk.example, len(chunk) if self._together else None
        kind = self._kind_of(example)
        key = kind, size, forms, num_steps
        if self._last is None or self._last[0] != key:
            if key not in self._known:
                # which padding may have made another
                first = unstack(chunk.stacked)[0] if self._together else chunk.tasks[0]
                traced = self._trace(kind, first, size, num_steps)
                if self._too_many(kind):
                    self._last = key, replace(traced, compiled=False)
                    return self._last[1]
                self._known[key] = traced
            self._last = key, self._known[key]
        return self._last[1]

    def _too_many(self, kind: tuple[Any, ...]) -> bool:
        """Return whether there are graphs for many other settings of tasks of this class."""
        others = {known[0] for known in self._known if known[0][0] is kind[0]}
        if kind in others or len(others) < _MOST_SETTINGS:
            return False
        if kind[0] not in self._told:
            self._told.add(kind[0])
            log.warning(
                "what %s holds besides tensors has been another in each of %d graphs: tasks with "
                "yet others run uncompiled; make what differs between tasks a tensor",
                kind[0].__name__,
                len(others),
            )
        return True

    def _kind_of(self, task: Any) -> tuple[Any, ...]:
        """Return the class of a tensor task, what its classes hold, and the task's settings."""
        kind = type(task)
        if kind not in self._looks:
            self._looks[kind] = ClassLook([kind]), ValuesLook()
        classes, values = self._looks[kind]
        return kind, classes.now(), values.now(settings_of(task))

    def _trace(self, kind: Any, task: Any, size: int | None, num_steps: int) -> Traced:
        before = capture()
        task = with_tensors(task, {})  # what the loss may do to it is not the user's
        steps = list(views(task, max(num_steps, 1)))
        draws = not same_states(before, capture())
        constant = all(view is task for view in steps)
        if len({(self._kind_of(v), shapes_of(v)) for v in steps}) > 1:
            raise EngineError(
                f"the minibatches of {type(task).__name__} differ in class, settings or shape: a "
                "compiled inner loop needs them alike; cycle through the data instead of ending "
                "with a smaller one, or use compile=False"
            )
        middle = capture()
        used = self._used(task, steps[0], num_steps)
        after = capture()
        if not same_host_draws(middle, after):
            raise EngineError(
                "the loss draws from Python's or NumPy's random generator, which a compiled inner "
                "loop would do only once: draw from torch, or in sample(), or use compile=False"
            )
        restore(before)
        functions = InnerFunctions(
            self._pure,
            self._inner,
            self._rule,
            used=used,
            task=without_data(task),
            view=None if constant else without_data(steps[0]),
            num_dims=tuple(p.dim() for p in self._params),
            num_tasks=size,
            device_type=self._params[0].device.type,
        )
        form = kind, size, used, None if constant else self._kind_of(steps[0])
        seen = sum(t.numel() for t in tensors_of(steps[0]).values())
        light = not self._together and seen * sum(p.numel() for p in self._params) <= _MOST_ALONE
        return Traced(form, functions, draws, not same_states(middle, after), light)

    def _used(self, task: Any, view: Any, num_steps: int) -> tuple[int, ...]:
        """Return which adapted parameters the loss depends on, by computing it once as it stands.

        Raises:
            EngineError: the loss changes what a graph would leave as it is.
        """
        adapted = self._inner.learned.those_adapted(range(len(self._params)))
        values = [p.detach() for p in self._params]
        copies = [v.clone() if i in adapted else v.view_as(v) for i, v in enumerate(values)]
        copies = [copy.requires_grad_() for copy in copies]
        fields = everything_of(view)
        self._copy.watch()
        versions = [t._version for t in tensors_of(view).values()]
        with torch.enable_grad(), self._inner.precision(copies[0].device):
            scalar(self._pure(copies, view), view, 0)
            scalar(self._pure(copies, query_of(task)), query_of(task), num_steps)
            # anew, as the query loss may have changed buffers in place that its graph refers to
            loss = self._pure(copies, view)
        self._copy.untouched()
        check_fields(view, fields)
        if versions != [t._version for t in tensors_of(view).values()]:
            raise EngineError(
                f"the loss of {type(view).__name__} changes its own tensors in place, which a "
                "compiled inner loop cannot keep from step to step: use compile=False"
            )
        try:
            grads = torch.autograd.grad(depends_on_model(loss, view, 0), copies, allow_unused=True)
        except RuntimeError as error:
            explain(error, self._inner.algorithm.second_order)
            raise
        return tuple(i for i in adapted if grads[i] is not None)

    def _graph(
        self, traced: Traced, function: Callable[..., Any], what: str, *, lean: bool
    ) -> Graph | AsItStands:
        def run(*inputs: Any) -> Any:  # a plain function, which methods are not
            return function(*inputs)

        make = self._make if traced.compiled else AsItStands
        return make(
            run,
            what=f"{what} of {'all tasks at once' if self._together else 'one task'}",
            tasks=type(traced.functions.task).__name__,
            device=traced.functions.device_type,
            mode=self._mode,
            lean=lean,
            context=traced.functions.attention,
        )


@dataclass(frozen=True)
class Traced:
    """How tasks of one class and settings are traced.

    Args:
        form: what a graph takes for granted of the tasks besides their tensors' forms.
        functions: what is compiled.
        draws: whether the minibatches are drawn at random.
        noisy: whether the loss draws at random.
        light: whether the loss is so small that a second thread costs more than it does.
        compiled: whether graphs are compiled, or run as they stand.
        programs: the graphs of all steps that have been made for it.
    """

    form: Any
    functions: InnerFunctions
    draws: bool
    noisy: bool
    light: bool
    compiled: bool = True
    programs: dict[Any, Any] = field(default_factory=dict)


def without_data(task: Any) -> Any:
    """Return the task with empty tensors, for its class and settings.

    The compiler takes a tensor that is both an input and held by the function for the latter, so
    that a graph would see the first task for ever.
    """
    return with_tensors(task, {name: t.new_empty(0) for name, t in tensors_of(task).items()})


def forms_of(*groups: TensorDict) -> tuple[Any, ...]:
    """Return what a graph takes for granted of tensors."""
    tensors = [tensor for group in groups for tensor in group.values()]
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def shapes_of(task: Any) -> tuple[Any, ...]:
    """Return the shapes and types of a tensor task's tensors."""
    return tuple((name, t.shape, t.dtype) for name, t in tensors_of(task).items())
