"""The outer step: rates that ε scales, schedules, clipping, and the mean of φ."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch

import naive
from koi import ConfigurationError, Koi, cosine, linear, warmup
from koi.settings import Settings, as_data, from_data
from resume_toys import Lines
from test_own_loop import Stop, learner
from toys import InTurn, Point, Quadratic, Regressions, assert_close, assert_same, small_net

SGD, Adam = torch.optim.SGD, torch.optim.Adam


def agree(**settings):
    """Assert that Koi and the naive twin end in one place; return Koi's learner and the mean."""
    settings = {"step_size": 0.05, "num_steps": 3, "num_iterations": 4, **settings}
    model = small_net()
    twin = deepcopy(model)
    torch.manual_seed(1)
    koi = Koi(model, vectorize=False, **settings)
    koi.train(Regressions())
    torch.manual_seed(1)
    settings.setdefault("meta_step_size", 1.0)
    mean = naive.meta_train(twin, Regressions(), **settings)
    assert_close(model, twin)
    return koi, mean


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize(
    "schedule", [0.5, linear(1.0, 0.1), cosine(1.0, 0.1), warmup(2.0, 0.5), lambda f: 1 / (1 + f)]
)
@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.3, momentum=0.9, nesterov=True), partial(Adam, lr=0.01)]
)
def test_epsilon_scales_the_rate_of_a_meta_optimizer(optimizer, schedule, algorithm):
    agree(meta_optimizer=optimizer, meta_step_size=schedule, algorithm=algorithm)


@pytest.mark.usefixtures("float64")
def test_without_epsilon_the_rate_is_the_optimizers_own():
    koi, _ = agree(meta_optimizer=partial(SGD, lr=0.3), meta_batch_size=2)
    assert [record.meta_step_size for record in koi.history] == [1.0] * 4


def test_rates_are_the_optimizers_own_again():
    made = []

    def make(params):
        groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": 0.25}]
        made.append(SGD(groups, momentum=0.9))
        return made[-1]

    seen = []
    koi = Koi(small_net(), 0.05, 2, 4, meta_optimizer=make, meta_step_size=linear(1.0, 0.0))
    rates = lambda *_: seen.append([group["lr"] for group in made[-1].param_groups])  # noqa: E731
    koi.train(Regressions(), callbacks=[rates])
    assert seen == [[0.5, 0.25]] * 4


def test_scheduler_of_the_users_own():
    """A scheduler sets the rate between meta-iterations, and ε scales what it set."""
    schedulers = []

    def make(params):
        optimizer = SGD(params, lr=1.0)
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return optimizer

    koi = Koi(Point(8.0), 0.5, 2, 3, meta_optimizer=make, meta_step_size=0.5)
    tasks = InTurn(Quadratic(0.0))
    for _ in range(3):
        koi.step(tasks)
        schedulers[-1].step()
    # φ − φ̃ is 3/4 φ, of which φ goes rate · ε
    expected = 8 * (1 - 0.5 * 0.75) * (1 - 0.25 * 0.75) * (1 - 0.125 * 0.75)
    assert koi.model.weight.item() == pytest.approx(expected)


def test_optimizer_without_a_rate():
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.add_(param.grad, alpha=-0.5)

    koi = Koi(Point(8.0), 0.5, 2, 1, meta_optimizer=Rateless)
    koi.train(InTurn(Quadratic(0.0)))
    assert koi.model.weight.item() == 8 - 0.5 * 6
    scaled = Koi(Point(8.0), 0.5, 2, 1, meta_optimizer=Rateless, meta_step_size=0.5)
    with pytest.raises(ConfigurationError, match="Rateless has no lr"):
        scaled.train(InTurn(Quadratic(0.0)))
    assert scaled.model.weight.item() == 8


def test_buffers_follow_epsilon_at_most_one():
    """BatchNorm's mean after two batches of ones, at momentum 0.1: 0.19."""

    class Ones:
        def sample(self):
            return self

        def loss(self, model):
            return (model(torch.ones(4, 3)) - 1).square().mean()

    for epsilon, expected in ((None, 0.19), (3.0, 0.19), (0.5, 0.095)):
        model = torch.nn.BatchNorm1d(3)
        optimizer = partial(SGD, lr=0.1)
        Koi(model, 0.1, 2, 1, meta_optimizer=optimizer, meta_step_size=epsilon).step(Ones())
        torch.testing.assert_close(model.running_mean, torch.full((3,), expected))


def test_schedules():
    assert [cosine(1.0, 0.0)(f) for f in (0.0, 1.0)] == [1.0, 0.0]
    assert cosine(2.0, 1.0)(1 / 3) == pytest.approx(1.75)
    rising = warmup(cosine(2.0, 0.0), 0.25)
    assert [rising(f) for f in (0.0, 0.125, 0.25)] == [0.0, 1.0, 2.0]
    assert rising(0.625) == pytest.approx(1.0)
    assert repr(rising) == "warmup(then=cosine(start=2.0, end=0.0), part=0.25)"
    for part in (0, 1, -0.1, "half"):
        with pytest.raises(ConfigurationError, match="part = "):
            warmup(1.0, part)


@pytest.mark.parametrize(
    "schedule", [linear(1, 0), cosine(1.0, 0.5), warmup(0.5, 0.1), warmup(linear(1.0, 0.0), 0.1)]
)
def test_schedules_are_data(schedule, tmp_path):
    assert from_data(as_data(schedule)) == schedule
    koi = learner(meta_step_size=schedule)
    koi.train(Lines(), callbacks=[Stop(2)])
    koi.save(tmp_path / "koi.safetensors")
    assert Koi.load(tmp_path / "koi.safetensors", small_net()).meta_step_size == schedule


def test_schedule_of_code_is_code():
    assert as_data(warmup(lambda f: f, 0.1)) == ("code", "warmup")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("meta_optimizer", [None, partial(SGD, lr=0.3, momentum=0.9)])
@pytest.mark.parametrize("clip", [0.001, 1e6])
def test_clip_meta(clip, meta_optimizer):
    koi, _ = agree(clip_meta=clip, meta_optimizer=meta_optimizer, meta_step_size=0.5)
    if meta_optimizer is None:
        short = [0.5 * min(r.meta_gradient_norm, clip) for r in koi.history]
        assert [r.update_norm for r in koi.history] == pytest.approx(short, rel=0.01)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average(decay):
    koi, mean = agree(average=decay, meta_step_size=0.5)
    for param, expected in zip(koi.averaged().model.parameters(), mean, strict=True):
        torch.testing.assert_close(param.detach(), expected)


def test_averaged_learner_is_a_copy(tmp_path):
    koi = learner(average=0.9, inner_optimizer="adam")
    koi.model[0].bias.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"averaged\(\) needs"):
        koi.averaged()
    koi.train(Lines())
    before = koi.model[0].weight.clone()
    other = koi.averaged()
    assert other.model[0].bias is koi.model[0].bias, "frozen parameters are shared"
    assert not torch.equal(other.model[0].weight, before)
    assert other.history == koi.history
    assert not math.isnan(other.evaluate(Lines(), 3).after)
    other.save(tmp_path / "koi.safetensors")
    model = small_net()
    model[0].bias.requires_grad_(False)
    model[0].bias.copy_(koi.model[0].bias)
    again = Koi.load(tmp_path / "koi.safetensors", model)
    assert_same(again.model, other.model)
    assert torch.equal(koi.model[0].weight, before)
    with pytest.raises(ConfigurationError, match=r"averaged\(\) needs"):
        learner().averaged()


@pytest.mark.parametrize("kill", [1, 4])
def test_average_goes_on(kill, tmp_path):
    alone = learner(average=0.9)
    alone.train(Lines())
    for callbacks in ([Stop(kill)], []):
        koi = learner(average=0.9)
        koi.train(Lines(), None, callbacks, tmp_path, resume=True)
    assert_same(koi.averaged().model, alone.averaged().model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_meta", 0), ("clip_meta", -1.0), ("average", 1), ("average", -0.1), ("average", True)],
)
def test_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} = "):
        Settings(**{name: value})


class Shard:
    """A data shard: a worker's batches, each used once, a pair of inputs and targets a step."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def minibatches(self, num_steps):
        return [Shard(x, y) for x, y in zip(self.inputs[:num_steps], self.targets, strict=False)]

    def loss(self, model):
        return torch.nn.functional.mse_loss(model(self.inputs), self.targets)


@pytest.mark.parametrize(
    ("inner", "tolerance"), [(SGD, 0), (partial(torch.optim.AdamW, weight_decay=0.1), 1e-6)]
)
def test_diloco(inner, tolerance):
    """Algorithm 1 of Douillard et al., arXiv 2311.08105, by hand: with SGD inside to the bit.

    Koi's own AdamW rounds otherwise than torch's. Workers' inner optimizers begin anew each round;
    in the paper each worker keeps its own.
    """
    rounds, workers, steps, momentum, outer_rate = 3, 2, 4, 0.9, 0.7
    torch.manual_seed(0)
    shape = (rounds, workers, steps, 5)
    data = torch.randn(*shape, 3), torch.randn(*shape, 2)
    model = small_net()
    twin = deepcopy(model)

    shards = (Shard(data[0][t, i], data[1][t, i]) for t in range(rounds) for i in range(workers))
    koi = Koi(
        model,
        step_size=0.05,
        num_steps=steps,
        num_iterations=rounds,
        meta_batch_size=workers,
        inner_optimizer=inner,
        inner_state="reset",
        meta_optimizer=lambda params: SGD(params, lr=outer_rate, momentum=momentum, nesterov=True),
    )
    koi.train(InTurn(*shards))

    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for t in range(rounds):
        replicas = [deepcopy(twin) for _ in range(workers)]
        for i, replica in enumerate(replicas):
            optimizer = inner(replica.parameters(), lr=0.05)
            for h in range(steps):
                optimizer.zero_grad()
                prediction = replica(data[0][t, i, h])
                torch.nn.functional.mse_loss(prediction, data[1][t, i, h]).backward()
                optimizer.step()
        with torch.no_grad():
            means = [
                sum(ps[1:], start=ps[0]) / workers
                for ps in zip(*(replica.parameters() for replica in replicas), strict=True)
            ]
            for v, p, mean in zip(velocity, twin.parameters(), means, strict=True):
                gradient = p - mean
                v.mul_(momentum).add_(gradient)
                p.add_(gradient.add(v, alpha=momentum), alpha=-outer_rate)
    torch.testing.assert_close(
        [p.detach() for p in model.parameters()],
        [p.detach() for p in twin.parameters()],
        rtol=tolerance,
        atol=tolerance,
    )
