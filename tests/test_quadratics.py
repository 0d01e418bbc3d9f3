"""Trajectories worked out by hand: on a/2 · |w − c|² the gradient is a (w − c)."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from koi import Koi
from toys import InTurn, Point, Quadratic, Regression, Regressions, assert_same, small_net, snapshot

pytestmark = pytest.mark.usefixtures("float64")

one_inner_step = pytest.mark.filterwarnings("ignore:num_steps = 1")
SGD, Adam = torch.optim.SGD, torch.optim.Adam


def trained(phi, tasks, **settings):
    """Return φ, a list of numbers, after training from ``phi``."""
    model = Point(*phi)
    Koi(model, **settings).train(InTurn(*tasks))
    return model.weight.tolist()


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("iterations", [1, 4])
def test_reptile(k, iterations):
    """φ − c shrinks by 1 − ε (1 − (1 − η a)^k) in each meta-iteration."""
    phi = trained(
        [3.0, -1.0],
        [Quadratic([1.0, 1.0], curvature=2.0)],
        step_size=0.1,
        num_steps=k,
        num_iterations=iterations,
        meta_step_size=0.25,
    )
    factor = (1 - 0.25 * (1 - 0.8**k)) ** iterations
    assert phi == pytest.approx([1 + 2 * factor, 1 - 2 * factor], rel=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("algorithm", "power"), [("fomaml", 1), ("maml", 2)])
def test_fomaml_and_maml(algorithm, power, k):
    """With r = (1 − η a)^k, ∇L(φ̃) = a r (φ − c); the derivative of φ̃(φ) brings one more r."""
    phi = trained(
        [3.0],
        [Quadratic([1.0], curvature=2.0)],
        step_size=0.1,
        num_steps=k,
        num_iterations=1,
        meta_step_size=0.25,
        algorithm=algorithm,
    )
    assert phi == pytest.approx([3 - 0.25 * 2 * (0.8**k) ** power * 2], rel=1e-12)


@pytest.mark.parametrize(("algorithm", "power"), [("fomaml", 0), ("maml", 1)])
def test_query_set_elsewhere(algorithm, power):
    """The support set pulls to 1, the query set to −1: the gradient is φ̃ + 1, times r for MAML."""
    task = Quadratic([1.0])
    task.query = Quadratic([-1.0])
    settings = {"step_size": 0.5, "num_steps": 2, "num_iterations": 1, "meta_step_size": 0.1}
    phi = trained([3.0], [task], algorithm=algorithm, **settings)
    adapted = 1 + 0.25 * 2
    assert phi == pytest.approx([3 - 0.1 * 0.25**power * (adapted + 1)], rel=1e-12)


def test_meta_batch_is_a_mean():
    tasks = [Quadratic([0.0]), Quadratic([2.0]), Quadratic([7.0])]
    settings = {"step_size": 0.5, "num_steps": 2, "num_iterations": 1, "meta_step_size": 0.5}
    phi = trained([1.0], tasks, meta_batch_size=3, **settings)
    # the mean of the centres is 3, and two steps go three quarters of the way
    assert phi == pytest.approx([1 + 0.5 * 0.75 * (3 - 1)], rel=1e-12)


def test_each_task_starts_from_phi():
    """Not from where the task before it ended: then this would end at 2.5."""
    tasks = [Quadratic([2.0]), Quadratic([4.0])]
    settings = {"step_size": 0.5, "num_steps": 2, "num_iterations": 1, "meta_step_size": 1.0}
    assert trained([0.0], tasks, meta_batch_size=2, **settings) == [0.75 * 3]


@pytest.mark.parametrize(
    ("nesterov", "expected"),
    [
        (False, 0.72),  # b = 1, w = 0.9; b = 0.9 + 0.9, w = 0.9 − 0.18
        (True, 0.5751),  # b = 1, w = 1 − 0.19; b = 0.9 + 0.81, w = 0.81 − 0.1 (0.81 + 0.9 · 1.71)
    ],
)
def test_momentum(nesterov, expected):
    optimizer = partial(SGD, momentum=0.9, nesterov=nesterov)
    settings = {"step_size": 0.1, "num_steps": 2, "num_iterations": 1, "meta_step_size": 1.0}
    phi = trained([1.0], [Quadratic([0.0])], inner_optimizer=optimizer, **settings)
    assert phi == pytest.approx([expected], rel=1e-12)


@one_inner_step
@pytest.mark.parametrize(
    ("inner_state", "expected"),
    [
        ("carry", 0.76),  # b = 1, w = 0.9; b = 0.5 + 0.9, w = 0.9 − 0.14
        ("reset", 0.81),  # b = 1, w = 0.9; b = 0.9, w = 0.9 − 0.09
    ],
)
def test_inner_state(inner_state, expected):
    phi = trained(
        [1.0],
        [Quadratic([0.0])],
        step_size=0.1,
        num_steps=1,
        num_iterations=2,
        meta_step_size=1.0,
        inner_optimizer=partial(SGD, momentum=0.5),
        inner_state=inner_state,
    )
    assert phi == pytest.approx([expected], rel=1e-12)


@one_inner_step
def test_carried_moments_of_a_meta_batch_are_averaged():
    """Two tasks with gradients 1 and −3 from φ = 1: the velocity that lives on is −1."""
    phi = trained(
        [1.0],
        [Quadratic([0.0]), Quadratic([4.0])],
        step_size=0.1,
        num_steps=1,
        num_iterations=2,
        meta_step_size=1.0,
        meta_batch_size=2,
        inner_optimizer=partial(SGD, momentum=0.5),
    )
    first = 1 + 0.1
    velocities = [-0.5 + first, -0.5 + first - 4]
    assert phi == pytest.approx([first - 0.1 * sum(velocities) / 2], rel=1e-12)


def test_adam_inside():
    """Corrected for its start, Adam's first steps are η · sign(gradient) while that is constant."""

    class Slope:
        def loss(self, model):
            return (model.weight * torch.tensor([5.0, -0.01])).sum()

    settings = {"step_size": 0.1, "num_steps": 3, "num_iterations": 1, "meta_step_size": 1.0}
    phi = trained([0.0, 0.0], [Slope()], inner_optimizer=partial(Adam, eps=0), **settings)
    assert phi == pytest.approx([-0.3, 0.3], rel=1e-12)


@pytest.mark.parametrize(("meta_step_size", "step"), [(None, 0.01), (0.0, 0.0), (7.0, 0.07)])
def test_adam_outside(meta_step_size, step):
    """Its first step is ε · lr · sign(φ − mean(φ̃))."""
    phi = trained(
        [1.0, -1.0],
        [Quadratic([0.0, 0.0]), Quadratic([0.5, 0.5])],
        num_steps=2,
        num_iterations=1,
        meta_batch_size=2,
        meta_step_size=meta_step_size,
        meta_optimizer=partial(Adam, lr=0.01, eps=0),
    )
    assert phi == pytest.approx([1 - step, -1 + step], rel=1e-12)


def test_sgd_outside_with_rate_epsilon_is_the_interpolation():
    settings = {"step_size": 0.1, "num_steps": 3, "num_iterations": 4}
    task = Quadratic([5.0])
    outside = trained([1.0], [task], meta_optimizer=partial(SGD, lr=0.3), **settings)
    assert outside == pytest.approx(trained([1.0], [task], meta_step_size=0.3, **settings))


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("meta_batch_size", [1, 3])
def test_epsilon_zero_leaves_everything(algorithm, meta_batch_size):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = snapshot(model)
    settings = {"algorithm": algorithm, "meta_batch_size": meta_batch_size}
    koi = Koi(model, num_steps=3, num_iterations=5, meta_step_size=0.0, **settings)
    koi.train(Regressions())
    assert_same(model, before)
    assert [record.update_norm for record in koi.history] == [0.0] * 5


@pytest.mark.parametrize("optimizer", [SGD, Adam, torch.optim.RMSprop])
def test_epsilon_one_takes_the_adapted_weights(optimizer):
    model = small_net()
    task = Regressions().sample()
    by_hand = deepcopy(model)
    stepper = optimizer(by_hand.parameters(), lr=0.05)
    for _ in range(4):
        stepper.zero_grad()
        task.loss(by_hand).backward()
        stepper.step()
    koi = Koi(model, 0.05, 4, 1, meta_step_size=1.0, inner_optimizer=optimizer)
    adapted = koi.adapt(task)
    koi.train(InTurn(task))
    assert_same(model, adapted)
    torch.testing.assert_close(snapshot(model), snapshot(by_hand), rtol=1e-12, atol=1e-14)


@one_inner_step
def test_one_inner_step_is_joint_sgd():
    """φ ← φ − ε η ∇ mean(loss): plain SGD on the mean loss of the meta-batch."""
    model = small_net()
    joint = deepcopy(model)
    tasks = [Regression(torch.randn(6, 3), torch.randn(6, 2)) for _ in range(4)]
    Koi(model, 0.1, 1, 5, meta_step_size=0.5, meta_batch_size=4).train(InTurn(*tasks))
    stepper = SGD(joint.parameters(), lr=0.5 * 0.1)
    for _ in range(5):
        stepper.zero_grad()
        (sum(task.loss(joint) for task in tasks) / 4).backward()
        stepper.step()
    torch.testing.assert_close(snapshot(model), snapshot(joint), rtol=1e-12, atol=1e-14)
