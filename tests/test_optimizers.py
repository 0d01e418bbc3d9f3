"""The inner optimizers written out as pure rules do what torch.optim does."""

from functools import partial, wraps

import pytest
import torch

from koi import ConfigurationError, Koi
from koi.inner.base import InnerLoop
from koi.inner.optimizers import rules as optimizers
from koi.inner.optimizers.bound import bound_optimizer
from koi.inner.optimizers.recognition import update_rule, why_no_rule
from koi.inner.optimizers.rules import make_optimizer
from koi.phi.learned import Learned

pytestmark = pytest.mark.usefixtures("float64")

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

WITH_RULE = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "sgd with weight decay": partial(SGD, weight_decay=0.1),
    "everything": partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": Adam,
    "adam without first moment": partial(Adam, betas=(0.0, 0.99)),
    "adam without second moment": partial(Adam, betas=(0.9, 0.0)),
    "adam with weight decay": partial(Adam, weight_decay=0.1),
    "adam with large eps": partial(Adam, eps=0.5),
    "adamw": AdamW,
    "adamw without decay": partial(AdamW, weight_decay=0.0),
}
WITHOUT_RULE = {
    "dampening": partial(SGD, momentum=0.9, dampening=0.1),
    "maximize": partial(Adam, maximize=True),
    "amsgrad": partial(AdamW, amsgrad=True),
    "rmsprop": torch.optim.RMSprop,
    "tensor as learning rate": lambda params, lr: Adam(params, lr=torch.tensor(lr)),
    "two groups": lambda params, lr: SGD([{"params": params[:1]}, {"params": params[1:]}], lr=lr),
    "a user's own subclass": type("MySGD", (SGD,), {}),
}
SHAPES = [(3, 2), (2,), ()]


def gradients(num_steps, unused=()):
    """Return random gradients; ``unused`` are pairs (step, parameter) that have none."""
    return [
        [None if (step, i) in unused else torch.randn(shape) for i, shape in enumerate(SHAPES)]
        for step in range(num_steps)
    ]


def torch_steps(factory, start, grads):
    """Return the parameters after each step of the torch.optim optimizer."""
    params = [p.clone().requires_grad_() for p in start]
    optimizer = factory(params, lr=0.1)
    trajectory = []
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        trajectory.append([p.detach().clone() for p in params])
    return trajectory


def rule_of(factory, start, **options):
    params = [p.clone().requires_grad_() for p in start]
    return update_rule(factory(params, 0.1), params, **options)


def bind(factory, params):
    """Return the optimizer as an engine binds it to the tensors that it steps."""
    rule = update_rule(factory(params, 0.1), params)
    return bound_optimizer(InnerLoop(Learned((), (), ()), "reptile", factory, 0.1, rule), params)


def assert_equal(trajectory, expected):
    for step, row in enumerate(expected):
        torch.testing.assert_close(trajectory[step], row, rtol=1e-12, atol=1e-14)


def start_params():
    return [torch.randn(shape) for shape in SHAPES]


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", WITH_RULE)
def test_rule_steps_as_torch(name, differentiable):
    factory, start, grads = WITH_RULE[name], start_params(), gradients(6)
    rule = rule_of(factory, start, differentiable=differentiable)
    expected = torch_steps(factory, start, grads)

    params, moments, pure = start, rule.initial(start), []
    for row in grads:
        params, moments = rule.step(row, params, moments)
        pure.append(params)
    assert_equal(pure, expected)

    params, moments, in_place = [p.clone() for p in start], rule.initial(start), []
    for row in grads:
        moments = rule.step_(row, params, moments)
        in_place.append([p.clone() for p in params])
    assert_equal(in_place, expected)


@pytest.mark.parametrize(
    "unused",
    [
        pytest.param([(0, 1), (1, 1), (2, 1), (3, 1)], id="never used"),
        pytest.param([(2, 1), (3, 1)], id="used at first"),
        pytest.param([(0, 1), (1, 1)], id="used later"),
        pytest.param([(0, 0), (0, 1), (0, 2)], id="nothing used in the first step"),
    ],
)
@pytest.mark.parametrize("name", WITH_RULE)
def test_parameter_without_gradient(name, unused):
    """It keeps its value (no weight decay) and its moments, as in torch.optim."""
    factory, start, grads = WITH_RULE[name], start_params(), gradients(4, unused)
    rule = rule_of(factory, start)
    params, moments, trajectory = start, rule.initial(start), []
    for row in grads:
        params, moments = rule.step(row, params, moments)
        trajectory.append(params)
    assert_equal(trajectory, torch_steps(factory, start, grads))


@pytest.mark.parametrize("name", WITH_RULE)
def test_rule_never_changes_what_it_is_given(name):
    start = start_params()
    rule = rule_of(WITH_RULE[name], start)
    (first, second) = gradients(2)
    params, moments = rule.step(first, start, rule.initial(start))
    given = [*params, *moments, *second]
    before = [t.clone() for t in given]
    rule.step(second, params, moments)
    rule.step_(second, [p.clone() for p in params], moments)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_which_optimizers_have_a_rule():
    start = start_params()
    assert rule_of(partial(SGD, momentum=0.5), start) == optimizers.SGD(lr=0.1, momentum=0.5)
    assert rule_of(partial(Adam, betas=(0.0, 0.9)), start) == optimizers.Adam(
        0.1, beta1=0.0, beta2=0.9
    )
    assert rule_of(AdamW, start) == optimizers.Adam(0.1, weight_decay=0.01, decoupled=True)
    for name, factory in WITHOUT_RULE.items():
        assert rule_of(factory, start) is None, name


def scheduled(params, lr):
    optimizer = SGD(params, lr)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return optimizer


def with_hook(params, lr):
    optimizer = Adam(params, lr)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def with_attribute(params, lr):
    optimizer = SGD(params, lr)
    optimizer.grad_scale = torch.tensor(2.0)  # its step looks for this
    return optimizer


REASONS = {
    "capturable=True": partial(Adam, capturable=True),
    "dampening=0.5": partial(SGD, momentum=0.9, dampening=0.5),
    "step is wrapped": scheduled,
    "step hooks": with_hook,
    "grad_scale is set or missing, unlike in SGD": with_attribute,
    "tag is set or missing, unlike in SGD": lambda params, lr: SGD(
        [{"params": params, "tag": 1}], lr
    ),
    "its weight_decay is a tensor": partial(SGD, weight_decay=torch.tensor(0.1)),
    "its betas is a tensor": partial(Adam, betas=(torch.tensor(0.9), torch.tensor(0.9))),
    "2 parameter groups": WITHOUT_RULE["two groups"],
    "it is MySGD": WITHOUT_RULE["a user's own subclass"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_an_optimizer_has_no_rule(reason):
    params = [p.requires_grad_() for p in start_params()]
    optimizer = REASONS[reason](params, 0.1)
    assert reason in why_no_rule(optimizer)
    assert update_rule(optimizer, params) is None


def test_a_step_put_in_the_place_of_torchs_for_all(monkeypatch):
    params = [p.requires_grad_() for p in start_params()]
    optimizer, step = SGD(params, 0.1), SGD.step
    assert why_no_rule(optimizer) is None

    @wraps(step)
    def counted(self, closure=None):
        return step(self, closure)

    monkeypatch.setattr(SGD, "step", counted)
    assert "step is wrapped or replaced" in why_no_rule(optimizer)


def test_complex_parameters_have_a_rule_of_sgd_alone():
    params = [torch.zeros(2, dtype=torch.complex128, requires_grad=True)]
    assert update_rule(partial(SGD, momentum=0.9)(params, 0.1), params) is not None
    assert "complex" in why_no_rule(Adam(params, 0.1))
    # those that it is not given do not matter
    params.append(torch.zeros(2, requires_grad=True))
    assert update_rule(Adam(params[1:], 0.1), params) == optimizers.Adam(0.1, only=frozenset({1}))


@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable"])
def test_how_torch_does_the_same_arithmetic_does_not_matter(name):
    for value in (True, False):
        for kind in (SGD, Adam, AdamW):
            assert rule_of(partial(kind, **{name: value}), start_params()) is not None


@pytest.mark.parametrize("name", WITH_RULE)
def test_rule_over_part_of_the_parameters(name):
    """Those in any order; the others keep value and moments, whatever gradient they have."""

    def factory(params, lr):
        return WITH_RULE[name](params[:0:-1], lr)

    start, grads = start_params(), gradients(4, unused=[(1, 2)])
    rule = rule_of(factory, start)
    assert rule.only == frozenset({1, 2})
    expected = torch_steps(factory, start, grads)
    params, moments, pure = start, rule.initial(start), []
    stepped, kept, in_place = [p.clone() for p in start], rule.initial(start), []
    for row in grads:
        params, moments = rule.step(row, params, moments)
        pure.append(params)
        kept = rule.step_(row, stepped, kept)
        in_place.append([p.clone() for p in stepped])
    assert_equal(pure, expected)
    assert_equal(in_place, expected)
    assert torch.equal(params[0], start[0])
    assert not any(m.any() for m in moments[: rule.num_slots * 3 : 3])


def test_differentiable_adam_at_zero_gradient():
    """√v has an infinite slope at 0; a dead unit must not turn the meta-gradient into NaN."""
    rule = optimizers.Adam(0.1, differentiable=True)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    grads = torch.autograd.grad((w[0] ** 2 + 0 * w[1]), [w], create_graph=True)
    (stepped,), _ = rule.step(grads, [w], rule.initial([w]))
    (slope,) = torch.autograd.grad(stepped.sum(), [w])
    # the first step is −0.1 · sign(g): its slope is 0 but for eps, and that of w itself is 1
    torch.testing.assert_close(slope, torch.tensor([1.0, 1.0]), rtol=1e-6, atol=1e-6)


BOUND = WITH_RULE | {k: v for k, v in WITHOUT_RULE.items() if k != "a user's own subclass"}


@pytest.mark.parametrize("name", BOUND)
def test_bound_optimizer_goes_on_from_its_moments(name):
    """Six steps are three steps, other work, and three more from the moments kept."""
    factory, start, grads = BOUND[name], start_params(), gradients(6)
    params = [p.clone().requires_grad_() for p in start]
    bound = bind(factory, params)
    bound.load(None)
    for row in grads[:3]:
        bound.step(row)
    kept, values = bound.moments(), [p.detach().clone() for p in params]
    copies = [m.clone() for m in kept]
    bound.load(None)
    bound.step(grads[0])
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    bound.load(kept)
    for row in grads[3:]:
        bound.step(row)
    one_go = [p.clone().requires_grad_() for p in start]
    optimizer = factory(one_go, 0.1)
    for row in grads:
        for param, grad in zip(one_go, row, strict=True):
            param.grad = grad
        optimizer.step()
    torch.testing.assert_close(params, one_go, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_torch_optimizer_leaves_no_gradients():
    params = [torch.zeros(2, requires_grad=True)]
    bound = bind(torch.optim.RMSprop, params)
    bound.load(None)
    bound.step([torch.ones(2)])
    assert params[0].grad is None


def test_factory_that_gives_no_optimizer():
    with pytest.raises(ConfigurationError, match=r"inner_optimizer returned list"):
        make_optimizer(lambda params, lr: [], [torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(ConfigurationError, match="inner_optimizer returned NoneType"):
        Koi(torch.nn.Linear(1, 1), inner_optimizer=lambda params, lr: None)


@pytest.mark.parametrize("kind", [SGD, torch.optim.RMSprop])
@pytest.mark.parametrize(
    ("choose", "what"),
    [
        (lambda params: params[2:], "none of its params, of which there are 2"),
        (lambda params: [{"params": []}], "with none of its params"),
        (lambda params: [torch.zeros(2, requires_grad=True)], "with other tensors than its params"),
    ],
)
def test_factory_that_gives_an_optimizer_of_other_parameters(kind, choose, what):
    with pytest.raises(ConfigurationError, match=rf"inner_optimizer .*{what}.*all or some of"):
        Koi(torch.nn.Linear(1, 1), inner_optimizer=lambda params, lr: kind(choose(params), lr))


def test_optimizer_that_calls_the_loss_itself():
    with pytest.raises(ConfigurationError, match=r"LBFGS.*closure"):
        Koi(torch.nn.Linear(1, 1), inner_optimizer=torch.optim.LBFGS)


def test_a_parameter_given_twice_steps_twice_as_in_torch():
    params = [torch.zeros(2, requires_grad=True)]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([*params, *params], 0.1)
    assert update_rule(optimizer, params) is None
