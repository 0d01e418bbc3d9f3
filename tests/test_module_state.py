"""Training leaves alone what is the user's: modes, gradients, identity; buffers move by ε."""

import pytest
import torch
from torch import nn

from koi import Koi
from toys import InTurn, Regression, Regressions, small_net

SETTINGS = {"step_size": 0.05, "num_steps": 3, "num_iterations": 3, "meta_step_size": 0.4}


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_what_is_the_users_stays(algorithm):
    """The module, its parameters, their gradients and requires_grad, and its modes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    for param in model.parameters():
        param.grad = torch.full_like(param, 7.0) if param.requires_grad else None
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [p.grad for p in model.parameters()]
    learn = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    koi = Koi(model, algorithm=algorithm, **SETTINGS)
    assert koi.train(Regressions()) is koi.model is model
    koi.evaluate(Regressions(), num_tasks=2)
    koi.adapt(Regressions().sample())

    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(g is None or bool((g == 7).all()) for g in gradients)
    assert learn == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert all(p.is_leaf for p in model.parameters())


def test_meta_optimizer_leaves_gradients_alone():
    model = small_net()
    model[0].weight.grad = kept = torch.ones(4, 3)
    Koi(model, meta_optimizer=torch.optim.Adam, **SETTINGS).train(Regressions())
    assert model[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert model[2].weight.grad is None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_running_statistics_move_by_epsilon(epsilon, algorithm):
    """From 0 to the adapted mean: with momentum 1/2 and k equal steps that is (1 − 2^−k) x̄."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2))
    inputs = torch.randn(6, 3)
    task = Regression(inputs, torch.randn(6, 2))
    settings = {"num_steps": 3, "num_iterations": 1, "algorithm": algorithm}
    Koi(model, meta_step_size=epsilon, **settings).train(InTurn(task))
    expected = epsilon * (1 - 0.5**3) * inputs.mean(0)
    torch.testing.assert_close(model[0].running_mean, expected)
    assert model[0].num_batches_tracked == (3 if epsilon > 0 else 0)


def test_modes_are_read_at_every_meta_iteration():
    """A callback may switch them; the working copy follows."""
    seen = []

    class Watching(Regression):
        def loss(self, model):
            seen.append(model.training)
            return super().loss(model)

    def switch(koi, record):
        koi.model.train(record.iteration == 1)

    koi = Koi(small_net(), check=False, **SETTINGS)
    task = Watching(torch.randn(6, 3), torch.randn(6, 2))
    koi.train(InTurn(task), callbacks=[switch])
    assert seen == [True] * 3 + [False] * 3 + [True] * 3
