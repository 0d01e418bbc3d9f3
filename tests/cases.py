"""One table of cases: every engine gives what `naive` gives, or refuses in these words.

A case is a model, a task, an inner optimizer, settings and an algorithm. A row of MODELS, TASKS,
OPTIMIZERS or SETTINGS is all that a new one takes: it is combined with the base of the others, in
every algorithm and every engine, and `test_properties` draws it too.
"""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import case_models as models
import case_optimizers as optimizers
import case_tasks as tasks
import koi
from engine_toys import ALGORITHMS, ENGINES, FAST

EVERY, MAML = tuple(ENGINES), ("maml",)
TOGETHER = ("vectorized", "vectorized+compiled")
COMPILED = ("compiled", "vectorized+compiled")


VECTORS, SEQUENCES = tasks.numbers(3), tasks.numbers(3, 2)
IMAGES, WORDS = tasks.numbers(1, 4, 4), tasks.sentences


@dataclass(frozen=True)
class Refusal:
    """Where something is refused, and words that the error, or the line in the log, has in it.

    With ``traced`` it is the compiler that refuses, and what it would have compiled is right.
    """

    words: str
    engines: Any = EVERY
    algorithms: Any = tuple(ALGORITHMS)
    traced: bool = False
    optimizers: Any = None  # of all


@dataclass(frozen=True)
class Model:
    """How a model is made, and its inputs drawn.

    Central differences see what a gradient does not: what is detached, such as a moving average
    that the loss depends on, or the row of padding in an embedding. With ``differences`` false
    MAML is held to the eager engine alone. Where forward changes a weight in place it is the
    compiler that keeps this from φ: with ``untraced`` false the compiled engines run only with it.
    """

    make: Callable[[], nn.Module]
    inputs: Any = VECTORS
    refusals: tuple[Refusal, ...] = ()
    differences: bool = True
    untraced: bool = True
    slow: bool = False
    needs: str = "torch"


@dataclass(frozen=True)
class Task:
    """How a task is made of a `tasks.Stream`, and the model that it is tried on.

    It is drawn with any other too, unless it asks something of the model (``anywhere``).
    """

    make: Callable[[Any], Any]
    refusals: tuple[Refusal, ...] = ()
    model: str = "mlp"
    differences: bool = True
    anywhere: bool = True


@dataclass(frozen=True)
class Optimizer:
    """How an inner optimizer is made."""

    make: Any
    refusals: tuple[Refusal, ...] = ()
    differences: bool = True


# An attribute that forward leaves changed is one task's own only one by one.
STATEFUL = Refusal("is changed in forward or in the loss", FAST)
BRANCH = (Refusal("data-dependent", COMPILED, traced=True),)
CHECKPOINT = (Refusal("torch.utils.checkpoint", FAST), Refusal("checkpoint", EVERY, MAML))
BY_REFERENCE = (Refusal("inward.weight", FAST), Refusal("inward.weight", EVERY, MAML))

FIRST_ORDER = tuple(name for name in ALGORITHMS if name not in MAML)
OUTSIDE = Refusal("has the optimizer inside the graph", COMPILED, FIRST_ORDER)
NO_RULE = (Refusal("differentiates through the inner optimizer", EVERY, MAML), OUTSIDE)
# torch's Adam takes |re|² and |im|² apart, which is no rule of Koi's.
ADAMS = ("adam", "adam with a large eps", "adamw", "no foreach", "adam on a part")
COMPLEX = tuple(replace(refusal, optimizers=ADAMS) for refusal in NO_RULE)

MODELS = {
    "mlp": Model(models.mlp),
    "conv": Model(models.conv, IMAGES),
    "conv in evaluation mode": Model(lambda: models.conv().eval(), IMAGES),
    "encoder": Model(models.Encoder, tasks.numbers(2, 3)),
    # differences would take long for the first two
    "lstm": Model(partial(models.lstm, num_layers=2), SEQUENCES, differences=False),
    "lstm both ways": Model(partial(models.lstm, bidirectional=True), SEQUENCES, differences=False),
    "lstm with a projection": Model(partial(models.lstm, proj_size=1), SEQUENCES),
    "gru": Model(models.gru, SEQUENCES),
    "rnn": Model(models.rnn, SEQUENCES),
    "embedding": Model(models.embedding, WORDS, differences=False),
    "embedding bag": Model(models.bag, WORDS, (Refusal("_embedding_bag_backward", EVERY, MAML),)),
    "tied": Model(models.Tied),
    "frozen": Model(models.frozen),
    "unused": Model(models.Unused),
    "kept in a tuple": Model(models.HeldInTuple, refusals=BY_REFERENCE),
    "closure": Model(models.Closing, refusals=(Refusal("module that Koi was given"),)),
    "scalar": Model(models.Tempered),
    "scaling in place": Model(models.Scaling, refusals=(Refusal("in place", EVERY, MAML),)),
    "weight norm": Model(models.with_weight_norm),
    "spectral norm": Model(
        models.with_spectral_norm,
        refusals=(Refusal("div.out", TOGETHER), Refusal("normalize", TOGETHER, traced=True)),
        differences=False,
    ),
    "orthogonal": Model(models.with_orthogonal),
    "layer norm": Model(lambda: models.around(nn.LayerNorm(4))),
    "group norm": Model(lambda: models.wide(nn.GroupNorm(1, 2))),
    "instance norm": Model(models.instance_norm),
    "prelu": Model(lambda: models.around(nn.PReLU(4))),
    "bilinear": Model(models.Bilinear),
    "dropout of nothing": Model(lambda: models.around(nn.Dropout(0.0))),
    "average assigned": Model(partial(models.Average, assigned=True)),
    "average in place": Model(partial(models.Average, assigned=False)),
    "complex buffer": Model(models.Spectrum),
    "complex parameter": Model(models.Complex, refusals=COMPLEX),
    "counter": Model(models.Counter),
    "flag": Model(
        lambda: nn.Sequential(models.ActNorm(), nn.Linear(3, 2)),
        refusals=BRANCH,
        differences=False,
        untraced=False,
    ),
    "weight changed in forward": Model(models.MaxNorm, differences=False, untraced=False),
    "infinite mask": Model(models.Masked, SEQUENCES),
    "hidden state": Model(models.Hidden, refusals=(STATEFUL,), differences=False),
    "calls": Model(models.Calls, refusals=(STATEFUL,)),
    "checkpoint": Model(partial(models.Checkpointed, reentrant=False), refusals=CHECKPOINT),
    "reentrant checkpoint": Model(
        partial(models.Checkpointed, reentrant=True), refusals=(Refusal("reentrant"),)
    ),
    "scripted part": Model(models.scripted, refusals=(Refusal("script"),)),
    "bert": Model(
        partial(models.Bert, masked=False),
        WORDS,
        differences=False,
        slow=True,
        needs="transformers",
    ),
    # which asks whether anything is masked, but not while it is traced
    "bert with a mask": Model(
        partial(models.Bert, masked=True),
        WORDS,
        differences=False,
        untraced=False,
        slow=True,
        needs="transformers",
    ),
    "llama": Model(models.Llama, WORDS, differences=False, slow=True, needs="transformers"),
    "lora": Model(models.lora, slow=True, needs="peft"),
    # these draw whether a layer is left out
    "loha": Model(models.loha, refusals=BRANCH, untraced=False, slow=True, needs="peft"),
    "lokr": Model(models.lokr, refusals=BRANCH, untraced=False, slow=True, needs="peft"),
}

NO_TENSORS = Refusal("is not a tensor task", FAST)

TASKS = {
    "split": Task(tasks.split),
    "fit": Task(tasks.of(tasks.Fit)),
    "plain": Task(tasks.of(tasks.Plain), (NO_TENSORS,)),
    "weighted": Task(tasks.weighted),
    "supervised, in minibatches": Task(tasks.supervised(4)),
    "supervised, all at once": Task(tasks.supervised(10)),
    "assigns a field": Task(tasks.of(tasks.Walk), (Refusal("field 'x'", FAST),), differences=False),
    "attribute that is no field": Task(tasks.shadowing),
    "sets a mode": Task(tasks.of(tasks.Unlearning), (STATEFUL,), "conv"),
    "sets a mode in the query": Task(
        tasks.of(tasks.UnlearningQuery), (STATEFUL,), "conv", differences=False
    ),
    "reads a global": Task(tasks.of(tasks.ReadsGlobal)),
    "reads its class": Task(tasks.of(tasks.ReadsClass)),
    "derivative by inputs": Task(
        tasks.of(tasks.InputDerivative), (Refusal("requires_grad_", FAST),), anywhere=False
    ),
    "jacobian by inputs": Task(tasks.of(tasks.InputJacobian), anywhere=False),
    "gradient penalty": Task(
        tasks.of(tasks.GradientPenalty),
        (
            Refusal("cannot be empty", FAST),
            Refusal("does not require grad", FAST),  # as torch 2.6 says it
            Refusal("torch.autograd.grad", COMPILED, traced=True),
        ),
        anywhere=False,
    ),
    # what stands in the place of parameters says that it requires no gradient
    "penalty on what learns": Task(
        tasks.of(tasks.Decayed), (Refusal("does not give", FAST),), "frozen", anywhere=False
    ),
    "penalty on what learns in the query": Task(
        tasks.of(tasks.DecayedQuery), (Refusal("does not give", FAST),), "frozen", anywhere=False
    ),
    "setting 1": Task(tasks.of(tasks.Typed, 1)),
    "setting 1.0": Task(tasks.of(tasks.Typed, 1.0)),
    "setting True": Task(tasks.of(tasks.Typed, True)),
    "settings of three types": Task(tasks.in_turn, (Refusal("differs between tasks", TOGETHER),)),
}

OPTIMIZERS = {
    "sgd": Optimizer("sgd"),
    "momentum": Optimizer(partial(torch.optim.SGD, momentum=0.9)),
    "nesterov": Optimizer(partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    "weight decay": Optimizer(partial(torch.optim.SGD, weight_decay=0.1)),
    "adam": Optimizer("adam", differences=False),  # whose slope where a gradient is 0 is 1 / eps
    "adam with a large eps": Optimizer(partial(torch.optim.Adam, eps=0.1)),
    "adamw": Optimizer(partial(torch.optim.AdamW, weight_decay=0.1, eps=0.1)),
    "rmsprop": Optimizer(torch.optim.RMSprop, NO_RULE),
    "sgd on a part": Optimizer(optimizers.last_two(torch.optim.SGD)),
    "adam on a part": Optimizer(optimizers.last_two(partial(torch.optim.Adam, eps=0.1))),
    "two groups": Optimizer(optimizers.two_groups, NO_RULE),
    "maximize": Optimizer(partial(torch.optim.SGD, maximize=True), NO_RULE),
    "no foreach": Optimizer(partial(torch.optim.Adam, foreach=False, eps=0.1)),
    "rate that is a tensor": Optimizer(optimizers.tensor_rate, NO_RULE),
    "subclass": Optimizer(optimizers.Clipped, NO_RULE),
    "hook": Optimizer(optimizers.hooked, (*NO_RULE, Refusal("step hooks", TOGETHER))),
    "state in the group": Optimizer(optimizers.Decaying, NO_RULE),
}

BASE = {
    "step_size": 0.1,
    "num_steps": 2,
    "num_iterations": 2,
    "meta_step_size": 0.5,
    "meta_batch_size": 2,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "one task": {"meta_batch_size": 1},
    "one step": {"num_steps": 1},
    "three steps": {"num_steps": 3},
    "chunks": {"chunk_size": 2, "meta_batch_size": 3},
    "reset": {"inner_state": "reset"},
    "no update": {"meta_step_size": 0.0},
    "whole update": {"meta_step_size": 1.0},
    "schedule": {"meta_step_size": koi.linear(1.0, 0.0)},
    "meta-optimizer": {"meta_optimizer": partial(torch.optim.Adam, lr=0.01)},
    "clipped": {"clip_meta": 0.05},
    "clipped meta-optimizer": {
        "clip_meta": 0.05,
        "meta_optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        "meta_step_size": koi.cosine(2.0, 0.5),
    },
}

# Beside every row with the base of the others: model, task, optimizer, settings.
PAIRS = [
    ("conv", "supervised, in minibatches", "momentum", "chunks"),
    ("conv", "fit", "adamw", "meta-optimizer"),
    ("conv", "weighted", "adam", "chunks"),
    ("counter", "weighted", "momentum", "chunks"),
    ("mlp", "weighted", "rmsprop", "as they are"),
    ("embedding", "fit", "adam", "as they are"),
    ("embedding", "split", "momentum", "chunks"),
    ("tied", "fit", "adam", "as they are"),
    ("tied", "split", "state in the group", "as they are"),
    ("frozen", "split", "weight decay", "as they are"),
    ("frozen", "fit", "rmsprop", "chunks"),
    ("unused", "fit", "adam", "as they are"),
    ("unused", "split", "weight decay", "as they are"),
    ("unused", "fit", "rmsprop", "as they are"),
    ("complex parameter", "fit", "adam", "as they are"),
    ("complex parameter", "split", "rmsprop", "as they are"),
    ("complex buffer", "plain", "sgd", "as they are"),
    ("gru", "supervised, in minibatches", "adam", "chunks"),
    ("average assigned", "plain", "sgd", "meta-optimizer"),
    ("average assigned", "fit", "adam", "chunks"),
    ("average in place", "fit", "sgd", "no update"),
    ("counter", "plain", "sgd", "as they are"),
    ("counter", "fit", "sgd", "no update"),
    ("counter", "fit", "sgd", "chunks"),
    ("flag", "plain", "sgd", "whole update"),
    ("hidden state", "plain", "momentum", "as they are"),
    ("infinite mask", "fit", "sgd", "whole update"),
    ("mlp", "split", "adam", "reset"),
    ("mlp", "split", "rmsprop", "reset"),
    ("mlp", "supervised, in minibatches", "adam on a part", "chunks"),
    ("mlp", "plain", "sgd on a part", "meta-optimizer"),
]


# In what engines every case runs each time.
SHORT = {
    "reptile": EVERY,
    "eigen-reptile": ("eager", "vectorized+compiled"),
    "fomaml": ("eager", "vectorized+compiled"),
    "maml": ("eager", "vectorized+compiled"),
}


@dataclass(frozen=True)
class Case:
    """Names of a row of each table, and the algorithm."""

    model: str = "mlp"
    task: str = "split"
    optimizer: str = "sgd"
    settings: str = "as they are"
    algorithm: str = "reptile"

    def __str__(self) -> str:
        return ", ".join([self.model, self.task, self.optimizer, self.settings, self.algorithm])

    @property
    def rows(self) -> tuple[Any, Any, Any]:
        return MODELS[self.model], TASKS[self.task], OPTIMIZERS[self.optimizer]

    def runs(self, engine: str) -> bool:
        """Return whether the engine's functions are right without the compiler, too."""
        return engine not in COMPILED or MODELS[self.model].untraced

    def slow(self, engine: str) -> bool:
        """Return whether `make test-slow` alone runs it; what is alike is sampled otherwise."""
        names = self.model, self.task, self.optimizer, self.settings
        pair = names in PAIRS and self.algorithm != "reptile"
        return pair or MODELS[self.model].slow or engine not in SHORT[self.algorithm]

    @property
    def differences(self) -> bool:
        """Whether the twin can say what MAML gives."""
        return all(row.differences for row in self.rows)

    def refusals(self, engine: str, traced: bool = False) -> list[str]:
        """Return the words of which a refusal has some; none: the engine gives what it should."""
        return [
            refusal.words
            for row in self.rows
            for refusal in row.refusals
            if engine in refusal.engines
            and self.algorithm in refusal.algorithms
            and self.optimizer in (refusal.optimizers or OPTIMIZERS)
            if traced or not refusal.traced
        ]

    def start(self) -> nn.Module:
        """Return a new model, always the same."""
        torch.manual_seed(zlib.crc32(self.model.encode()))
        return MODELS[self.model].make()

    def stream(self, seed: int) -> tasks.Stream:
        """Return a distribution of new tasks, always the same."""
        return tasks.Stream(TASKS[self.task].make, MODELS[self.model].inputs, seed)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `koi.Koi`, but for the engine's."""
        given = BASE | SETTINGS[self.settings] | {"algorithm": self.algorithm}
        if self.algorithm == "maml":  # of which the twin takes every derivative by two trainings
            given["num_iterations"] = 1
        return given | {"inner_optimizer": OPTIMIZERS[self.optimizer].make}


def table() -> list[Case]:
    """Return all cases: every row with the base of the others, and the pairs."""
    rows = [Case(model=name) for name in MODELS]
    rows += [Case(task=name, model=row.model) for name, row in TASKS.items()]
    rows += [Case(optimizer=name) for name in OPTIMIZERS]
    rows += [Case(settings=name) for name in SETTINGS]
    rows += [Case(*names) for names in PAIRS]
    each = itertools.product(dict.fromkeys(rows), ALGORITHMS)
    return [Case(r.model, r.task, r.optimizer, r.settings, algorithm) for r, algorithm in each]
