"""Whatever is made of the inner optimizer is what a plain loop with it gives, in any engine."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import naive
from engine_toys import ENGINES, SETTINGS, Fit, mlp
from koi import ConfigurationError, EngineError, Koi
from koi.inner.optimizers.recognition import why_no_rule
from toys import InTurn, assert_close

pytestmark = pytest.mark.usefixtures("float64")

SGD, Adam, AdamW, RMSprop = (getattr(torch.optim, n) for n in ("SGD", "Adam", "AdamW", "RMSprop"))
RUN = {name: value for name, value in SETTINGS.items() if name != "seed"}


def with_hooks(params, lr):
    """They double the gradients before a step, and bound the parameters after it."""

    def double(optimizer, args, kwargs):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = 2 * param.grad

    def clamp(optimizer, args, kwargs):
        with torch.no_grad():
            for param in optimizer.param_groups[0]["params"]:
                param.clamp_(-0.5, 0.5)

    optimizer = SGD(params, lr, momentum=0.9)
    optimizer.register_step_pre_hook(double)
    optimizer.register_step_post_hook(clamp)
    return optimizer


def scheduled(params, lr):
    """The scheduler counts steps outside of the optimizer."""
    optimizer = Adam(params, lr)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def with_wrapped_step(params, lr):
    optimizer = SGD(params, lr)
    step = optimizer.step

    def clipped():
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        step()

    optimizer.step = clipped
    return optimizer


def begun(params, lr):
    """It comes with a velocity."""
    optimizer = SGD(params, lr, momentum=0.9)
    for param in params:
        optimizer.state[param]["momentum_buffer"] = torch.full_like(param, 0.1)
    return optimizer


def only_matrices_decay(params, lr):
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr)


def clipped(params, lr):
    class Clipped(SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            return super().step(closure)

    return Clipped(params, lr)


def rates_of_their_own(params, lr):
    return SGD([{"params": params[:2], "lr": lr / 2}, {"params": params[2:]}], lr, momentum=0.9)


# A rule stands for these.
ORDINARY = {
    "no foreach": partial(SGD, momentum=0.9, nesterov=True, foreach=False),
    "fused": partial(Adam, fused=True),
    "fused SGD": partial(SGD, momentum=0.9, fused=True),
    "head": lambda params, lr: SGD(params[-2:], lr),
    "body with weight decay": lambda params, lr: SGD(params[:2], lr, weight_decay=0.1),
    "some, in another order": lambda params, lr: SGD(
        [params[3], params[0]], lr, momentum=0.9, nesterov=True
    ),
    "all, backwards": lambda params, lr: Adam(params[::-1], lr),
    "head with Adam": lambda params, lr: Adam(params[-2:], lr),
    "head with AdamW": lambda params, lr: AdamW(params[-2:], lr),
}
# These step as themselves, all tasks at once.
STACKED = {
    "maximize": partial(SGD, maximize=True, momentum=0.9),
    "dampening": partial(SGD, momentum=0.9, dampening=0.5),
    "amsgrad": partial(AdamW, amsgrad=True),
    "tensor as rate": lambda params, lr: Adam(params, torch.tensor(lr)),
    "tensors as betas": lambda params, lr: Adam(
        params, lr, betas=(torch.tensor(0.8), torch.tensor(0.9))
    ),
    "subclass": type("MySGD", (SGD,), {}),
    "rates of their own": rates_of_their_own,
    "head with RMSprop": lambda params, lr: RMSprop(params[-2:], lr, momentum=0.9),
    "a state to begin with": begun,
    "an entry of the user's own": lambda params, lr: SGD([{"params": params, "tag": 1}], lr),
}
# These step as themselves, one task after the other, for the reason given.
ONE_BY_ONE = {
    "hooks": (with_hooks, "step hooks"),
    "a scheduler in a hook": (scheduled, "step hooks"),
    "wrapped step": (with_wrapped_step, "wrapped step"),
    "groups by shape": (only_matrices_decay, "a dimension more"),
    "clipped by norm": (clipped, "element by element"),
}
EVERY = ORDINARY | STACKED | {name: factory for name, (factory, _) in ONE_BY_ONE.items()}


def tasks():
    """Return the same eight tasks, in turn."""
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator)
    return InTurn(*[Fit(draw(6, 3), draw(6, 2)) for _ in range(8)])


def by_hand(start, factory, **settings):
    model = deepcopy(start)
    naive.meta_train(model, tasks(), **RUN | {"inner_optimizer": factory} | settings)
    return model


def trained(start, factory, engine, **settings):
    """Return the learner after the training, in this engine or a refusal."""
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | {"inner_optimizer": factory} | settings
    learner = Koi(deepcopy(start), vectorize=vectorize, compile=compile, **settings)
    learner.train(tasks())
    assert learner.engine == engine
    return learner


@pytest.mark.parametrize(
    ("algorithm", "inner_state"),
    [
        ("reptile", "carry"),
        ("fomaml", "reset"),
        pytest.param("fomaml", "carry", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_any_optimizer_is_as_by_hand(name, algorithm, inner_state, caplog):
    factory, start = EVERY[name], mlp()
    settings = {"algorithm": algorithm, "inner_state": inner_state}
    expected = by_hand(start, factory, **settings)
    assert_close(trained(start, factory, "eager", **settings).model, expected, 1e-10, 1e-12)
    if name not in ONE_BY_ONE:
        learner = trained(start, factory, "vectorized", **settings)
        assert_close(learner.model, expected, 1e-10, 1e-12)
        return
    reason = ONE_BY_ONE[name][1]
    with pytest.raises(EngineError, match=reason):
        trained(start, factory, "vectorized", **settings)
    learner = Koi(deepcopy(start), **SETTINGS, inner_optimizer=factory, **settings)
    learner.train(tasks())
    assert learner.engine == "eager"
    assert reason in caplog.text
    assert_close(learner.model, expected, 1e-10, 1e-12)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("name", ORDINARY)
def test_every_rule_in_the_graph(name, algorithm, engine):
    factory, start = ORDINARY[name], mlp()
    learner = trained(start, factory, engine, algorithm=algorithm)
    expected = by_hand(start, factory, algorithm=algorithm)
    assert_close(learner.model, expected, 1e-10, 1e-12)


MAML = {"algorithm": "maml", "num_iterations": 2, "meta_batch_size": 2}


@cache
def maml_by_hand(name):
    """Return a start and what is made of it, once for all engines."""
    start = mlp()
    return start, by_hand(start, ORDINARY[name], **MAML)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", ["head", "some, in another order", "head with Adam"])
@pytest.mark.parametrize("engine", ENGINES)
def test_maml_over_part_of_the_parameters(engine, name):
    start, expected = maml_by_hand(name)
    learner = trained(start, ORDINARY[name], engine, **MAML)
    assert_close(learner.model, expected, 1e-6, 1e-8)


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("head")])
def test_adapting_leaves_what_the_optimizer_was_not_given(name):
    start, task = mlp(), tasks().sample()
    adapted = Koi(start, **SETTINGS, inner_optimizer=EVERY[name]).adapt(task)
    same = [
        torch.equal(p, q) for p, q in zip(start.parameters(), adapted.parameters(), strict=True)
    ]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("name", ["own", "everybody's"])
def test_hooks_are_called_at_each_inner_step_of_each_task(name, algorithm, request):
    calls = []

    def factory(params, lr):
        optimizer = SGD(params, lr)
        if name == "own":
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        return optimizer

    if name == "everybody's":
        for register, what in [
            (register_optimizer_step_pre_hook, "before"),
            (register_optimizer_step_post_hook, "after"),
        ]:
            handle = register(lambda *_, what=what: calls.append(what))
            request.addfinalizer(handle.remove)
    settings = SETTINGS | {"algorithm": algorithm, "check": False}  # the check steps, too
    learner = Koi(mlp(), **settings, inner_optimizer=factory)
    learner.train(tasks())
    num_steps = SETTINGS["num_iterations"] * SETTINGS["meta_batch_size"] * SETTINGS["num_steps"]
    assert calls == ["before", "after"] * num_steps


@pytest.mark.parametrize("name", [*STACKED, *ONE_BY_ONE])
def test_maml_says_what_it_cannot_differentiate_through(name):
    model = mlp()
    reason = why_no_rule(EVERY[name](list(model.parameters()), 0.1))
    with pytest.raises(ConfigurationError, match=r"SGD, Adam and AdamW as they come") as caught:
        Koi(model, inner_optimizer=EVERY[name], algorithm="maml")
    assert f"and here {reason}: change that, or choose 'fomaml'" in str(caught.value)


def test_a_step_that_torch_refuses_is_explained():
    koi = Koi(mlp(), inner_optimizer=partial(Adam, capturable=True), num_iterations=1)
    with pytest.raises(ConfigurationError, match=r"gave Adam, which cannot step .*capturable=True"):
        koi.train(tasks())


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_factory_may_keep_the_optimizer(vectorize):
    """The model's own parameters are in none that steps."""
    made, model = [], mlp()

    def factory(params, lr):
        made.append(RMSprop(params, lr))
        return made[-1]

    learner = Koi(model, **SETTINGS, inner_optimizer=factory, vectorize=vectorize)
    learner.train(tasks())
    own = set(map(id, model.parameters()))
    stepped = [id(p) for o in made if o.state for p in o.param_groups[0]["params"]]
    assert stepped
    assert own.isdisjoint(stepped)


def test_parameters_told_by_comparing_them_with_the_models():
    """A rule steps what is meant; what steps as itself steps a copy, and cannot know."""
    model = mlp()
    for kind in (SGD, RMSprop):
        koi = Koi(
            model,
            **SETTINGS,
            inner_optimizer=lambda params, lr, kind=kind: kind(
                [p for p in params if p is not model[0].weight], lr
            ),
        )
        if kind is SGD:
            adapted = koi.adapt(tasks().sample())
            assert torch.equal(adapted[0].weight, model[0].weight)
            assert not torch.equal(adapted[0].bias, model[0].bias)
        else:
            with pytest.raises(ConfigurationError, match=r"not by comparing them with the model's"):
                koi.adapt(tasks().sample())


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, sparse=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.embedding(x)).mean(1)


def sentences():
    generator = torch.Generator().manual_seed(3)
    return InTurn(
        *[
            Fit(
                torch.randint(5, (6, 2), generator=generator),
                torch.randn(6, 2, generator=generator),
            )
            for _ in range(8)
        ]
    )


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sparse_gradients(options):
    start = Words()
    settings = {"inner_optimizer": partial(SGD, **options), "inner_state": "reset"}
    learner = Koi(deepcopy(start), **SETTINGS, **settings, vectorize=False)
    learner.train(sentences())
    expected = deepcopy(start)
    naive.meta_train(expected, sentences(), **RUN, **settings)
    assert_close(learner.model, expected, 1e-10, 1e-12)


def test_adam_refuses_sparse_gradients():
    """When the learner is made, where a module says it; where a function does, at the step."""
    with pytest.raises(ConfigurationError, match=r"Adam inside .* sparse gradients .*'sgd'"):
        Koi(Words(), **SETTINGS, inner_optimizer="adam")

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = Words()
            self.words.embedding.sparse = False

        def forward(self, x):
            self.words.embedding.sparse = True
            try:
                return self.words(x)
            finally:
                self.words.embedding.sparse = False

    koi = Koi(Function(), **SETTINGS, inner_optimizer="adam", vectorize=False, check=False)
    with pytest.raises(ConfigurationError, match=r"Adam, which takes no sparse gradients.*'sgd'"):
        koi.train(sentences())


class Complex(nn.Module):
    """A complex linear layer and a real one of its output's real and imaginary parts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.phase = nn.Parameter(torch.randn((), dtype=torch.complex128))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        hidden = (x.to(self.weight.dtype) @ self.weight) * self.phase
        return self.head(torch.view_as_real(hidden.tanh()).flatten(-2))


COMPLEX = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9, nesterov=True),
    "weight decay": partial(SGD, momentum=0.9, weight_decay=0.1),
    "adam": Adam,
    "adamw": partial(AdamW, weight_decay=0.1),
    "rmsprop": RMSprop,
    "head": lambda params, lr: SGD(params[:2], lr),
}


@pytest.mark.parametrize("engine", ["eager", "vectorized"])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_parameters(name, algorithm, engine):
    factory, start = COMPLEX[name], Complex()
    learner = trained(start, factory, engine, algorithm=algorithm)
    assert_close(learner.model, by_hand(start, factory, algorithm=algorithm), 1e-10, 1e-12)
