"""What cannot be compiled says why, and what can only one by one runs so."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import koi
from engine_toys import SETTINGS, Fit, Fits, assert_agree, mlp, trained
from koi import EngineError, Koi, TaskError

pytestmark = pytest.mark.usefixtures("float64", "traced")
COMPILED = ["compiled", "vectorized+compiled"]


class Item(Fit):
    def loss(self, model):
        loss = super().loss(model)
        return loss / max(loss.item(), 1.0)


class Branch(Fit):
    def loss(self, model):
        loss = super().loss(model)
        return loss if loss > 1 else 2 * loss


class Draw(Fit):
    def loss(self, model):
        return super().loss(model) * np.random.uniform(1, 2)


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y

    loss = Fit.loss


for cls in (Item, Branch, Draw):
    koi.tensor_task(cls)

REASONS = {
    Branch: r"the inner loop of Branch cannot be compiled .*torch\.where",
    Draw: r"draws from Python's or NumPy's .*draw from torch",
    Plain: r"Plain is not a tensor task.*@koi\.tensor_task",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("vectorize", [False, "auto"])
def test_what_cannot_be_compiled(kind, vectorize):
    model = mlp()
    start = deepcopy(model)
    settings = SETTINGS | {"vectorize": vectorize, "compile": True}
    with pytest.raises(EngineError, match=REASONS[kind]) as caught:
        Koi(model, **settings).train(Fits(kind=kind))
    assert "meta-iteration 0" in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), dict(start.state_dict()), rtol=0, atol=0)


def test_what_can_be_compiled_but_not_mapped(caplog):
    model = mlp()
    learner = Koi(deepcopy(model), compile=True, **SETTINGS)
    learner.train(Fits(kind=Item))
    assert learner.engine == "compiled"
    assert "without .item()" in caplog.text
    assert_agree(learner, trained("eager", model, Fits(kind=Item)))


@pytest.mark.parametrize("engine", COMPILED)
def test_optimizer_that_is_no_rule(engine):
    with pytest.raises(EngineError, match="has the optimizer inside the graph"):
        trained(engine, mlp(), Fits(), inner_optimizer=torch.optim.RMSprop)


def test_one_by_one_where_together_is_impossible(caplog):
    class Growing(Fits):
        def sample(self):
            size = int(torch.randint(4, 6, ()))
            return Fit(torch.randn(size, 3), torch.randn(size, 2))

    model = mlp()
    learner = Koi(deepcopy(model), compile=True, **SETTINGS)
    learner.train(Growing())
    assert learner.engine == "compiled"
    assert "cannot be stacked" in caplog.text
    assert_agree(learner, trained("eager", model, Growing()))


@pytest.mark.parametrize("engine", COMPILED)
def test_mistakes_in_the_loss_are_the_users_own(engine):
    class Mistake(Fit):
        def loss(self, model):
            return model(self.x) - self.y

    koi.tensor_task(Mistake)
    with pytest.raises(TaskError, match=r"shape \(6, 2\)"):
        trained(engine, mlp(), Fits(kind=Mistake))
