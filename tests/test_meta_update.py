"""Koi takes the same steps as the naive twin."""

from copy import deepcopy
from functools import partial

import pytest
import torch

import naive
from koi import Koi, linear
from toys import Regressions, assert_close, small_net

pytestmark = pytest.mark.usefixtures("float64")

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "weight decay": partial(SGD, weight_decay=0.1),
    "momentum and weight decay": partial(SGD, momentum=0.5, weight_decay=0.1),
    "dampening": partial(SGD, momentum=0.9, dampening=0.5),
    "maximize": partial(SGD, maximize=True),
    "adam": Adam,
    "adam as in the paper": partial(Adam, betas=(0.0, 0.999)),
    "adam with weight decay": partial(Adam, weight_decay=0.1),
    "amsgrad": partial(Adam, amsgrad=True),
    "adamw": partial(AdamW, weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "rmsprop with momentum": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
}
DIFFERENTIABLE = [
    "sgd",
    "momentum",
    "nesterov",
    "weight decay",
    "adam",
    "adam as in the paper",
    "adam with weight decay",
    "adamw",
]


def agree(tasks, rtol=1e-9, atol=1e-12, num_iterations=3, **settings):
    """Assert that Koi and the twin, from one model and one random state, end in one place."""
    settings = {"step_size": 0.05, "num_steps": 4, "meta_step_size": 0.3, **settings}
    settings["num_iterations"] = num_iterations
    model = small_net()
    twin, start = deepcopy(model), deepcopy(model)
    torch.manual_seed(1)
    Koi(model, vectorize=False, **settings).train(tasks)
    if isinstance(settings.get("inner_optimizer"), str):
        del settings["inner_optimizer"]
    torch.manual_seed(1)
    naive.meta_train(twin, tasks, **settings)
    assert_close(model, twin, rtol, atol)
    with pytest.raises(AssertionError):
        assert_close(model, start, rtol, atol)


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("meta_batch_size", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_every_optimizer(algorithm, optimizer, meta_batch_size, inner_state):
    agree(
        Regressions(split=True),
        algorithm=algorithm,
        inner_optimizer=OPTIMIZERS[optimizer],
        meta_batch_size=meta_batch_size,
        inner_state=inner_state,
    )


@pytest.mark.parametrize(
    ("optimizer", "meta_batch_size"), [*((name, 1) for name in DIFFERENTIABLE), ("adam", 3)]
)
def test_maml_with_every_differentiable_optimizer(optimizer, meta_batch_size):
    # the twin's derivative is a central difference
    agree(
        Regressions(split=True),
        rtol=1e-6,
        atol=1e-8,
        algorithm="maml",
        num_iterations=2,
        inner_optimizer=OPTIMIZERS[optimizer],
        meta_batch_size=meta_batch_size,
    )


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_task_without_minibatches_and_query(algorithm):
    rtol, atol = (1e-6, 1e-8) if algorithm == "maml" else (1e-9, 1e-12)
    agree(Regressions(), rtol, atol, algorithm=algorithm, meta_batch_size=2)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize(
    "meta_optimizer", [partial(Adam, lr=0.01), partial(SGD, lr=0.1, momentum=0.9)]
)
def test_meta_optimizer(meta_optimizer, algorithm):
    rtol, atol = (1e-6, 1e-7) if algorithm == "maml" else (1e-9, 1e-12)
    agree(
        Regressions(split=True),
        rtol,
        atol,
        meta_optimizer=meta_optimizer,
        meta_batch_size=3,
        algorithm=algorithm,
    )


@pytest.mark.parametrize("schedule", [linear(1.0, 0.0), lambda done: (1 - done) ** 2])
def test_schedule(schedule):
    agree(Regressions(), meta_step_size=schedule, num_iterations=4)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_names_stand_for_the_defaults_of_torch(name):
    model = small_net()
    other = deepcopy(model)
    optimizer = {"sgd": SGD, "adam": Adam}[name]
    settings = {"num_steps": 3, "num_iterations": 3, "meta_step_size": 0.5}
    torch.manual_seed(1)
    Koi(model, inner_optimizer=name, **settings).train(Regressions())
    torch.manual_seed(1)
    naive.meta_train(other, Regressions(), step_size=0.01, inner_optimizer=optimizer, **settings)
    assert_close(model, other)
