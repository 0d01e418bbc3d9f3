"""What cannot be right is refused with a sentence that says what to do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine_toys import SETTINGS, Fit, Fits, mlp, trained
from koi import ConfigurationError, EngineError, Koi, ModelError, NonFiniteError

pytestmark = pytest.mark.usefixtures("float64")


class Saving(nn.Module):
    """Computes its middle again in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = checkpoint(self.middle, hidden, use_reentrant=self.use_reentrant)
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("compile", [False, True])
def test_reentrant_checkpoint(algorithm, compile):
    koi = Koi(*(Saving(True),), vectorize=False, compile=compile, algorithm=algorithm, **SETTINGS)
    with pytest.raises(ModelError, match="use use_reentrant=False"):
        koi.train(Fits(kind=Fit))


def test_checkpoint_in_maml():
    with pytest.raises(ModelError, match=r"gradient_checkpointing_disable.*algorithm='fomaml'"):
        trained("eager", Saving(False), Fits(kind=Fit), algorithm="maml")
    trained("eager", Saving(False), Fits(kind=Fit), algorithm="fomaml")


class Far(nn.Linear):
    """How far the outputs are from two places; torch cannot differentiate that twice."""

    def forward(self, x):
        return torch.cdist(super().forward(x), torch.eye(2, dtype=x.dtype), p=1.5)


@pytest.mark.parametrize("vectorize", [False, "auto"])
def test_function_without_a_second_derivative(vectorize):
    koi = Koi(Far(3, 2), vectorize=vectorize, algorithm="maml", **SETTINGS)
    with pytest.raises(ModelError, match="algorithm='fomaml' or 'reptile'"):
        koi.train(Fits(kind=Fit))


class Growing(nn.Module):
    """An observer whose buffer takes on the inputs' form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x):
        self.largest = x.detach().abs().amax(0)
        return self.layer(x)


@pytest.mark.parametrize("vectorize", [False, "auto"])
def test_buffer_that_grows(vectorize):
    with pytest.raises(ModelError, match=r"'largest' of shape \(0,\), .*run one batch through"):
        Koi(Growing(), vectorize=vectorize, **SETTINGS).train(Fits(kind=Fit))


def test_buffer_that_is_no_longer_infinite():
    """An observer that begins at ∞, where nothing lies between before and after."""
    model = Growing()
    model.largest = torch.full((3,), -torch.inf)
    with pytest.raises(NonFiniteError, match="buffer 'largest', whose values were not all finite"):
        trained("eager", model, Fits(kind=Fit))
    assert bool((model.largest == -torch.inf).all())


class Replacing(nn.Linear):
    """Puts another parameter in the place of its own."""

    def forward(self, x):
        result = super().forward(x)
        self.weight = nn.Parameter(0.9 * self.weight.detach())
        return result


class Clamping(nn.Sequential):
    """Keeps a frozen layer small, in place."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
        self[0].requires_grad_(False)

    def forward(self, x):
        self[0].weight.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("vectorize", [False, "auto"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replacing(3, 2), "'weight' is replaced in forward .*change it in place"),
        (Clamping, "frozen parameter '0.weight' in place, .*make it a buffer"),
    ],
)
def test_parameters_that_a_task_may_not_change(make, message, vectorize):
    with pytest.raises(ModelError, match=message):
        Koi(make(), vectorize=vectorize, **SETTINGS).train(Fits(kind=Fit))


def test_another_model():
    koi = Koi(mlp())
    koi.model = koi.model.eval()
    with pytest.raises(ConfigurationError, match="make a new Koi for a new model"):
        koi.model = mlp()


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_size", -1.0), ("num_steps", 1.5), ("algorithm", "mamel"), ("autocast", torch.int8)],
)
def test_settings_are_checked_whenever_they_are_set(name, value):
    koi = Koi(mlp())
    before = getattr(koi, name)
    with pytest.raises(ConfigurationError, match=name):
        setattr(koi, name, value)
    assert getattr(koi, name) == before


def test_query_loss_that_changes_the_model_from_inside():
    class Listing(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.seen = []

        def forward(self, x):
            self.seen.append(len(x))
            return super().forward(x)

    koi = Koi(Listing(), vectorize=False, **SETTINGS)
    with pytest.raises(ModelError, match=r"'seen' from inside, .*assign a new value"):
        koi.evaluate(Fits(), 2)


def test_sparse_adjacency_says_why_it_cannot_be_compiled():
    graph = torch.eye(6).to_sparse()

    class Neighbours(nn.Linear):
        def forward(self, x):
            return super().forward(torch.sparse.mm(graph, x))

    koi = Koi(Neighbours(3, 2), vectorize=False, compile=True, **SETTINGS)
    with pytest.raises(EngineError, match=r"cannot be compiled \((?!.*raised:\))"):
        koi.train(Fits(kind=Fit))


class Head(nn.Module):
    """A table of words that are looked up with padding, by the function and not the module."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        words = (x[:, 0].detach().abs() * 2).long().clamp(max=4)
        return self.layer(F.embedding(words, self.table, padding_idx=0))


def test_padding_by_the_function_is_found_out(caplog):
    model = Head()
    koi = Koi(model, **SETTINGS)
    koi.train(Fits(kind=Fit))
    assert koi.engine == "eager"
    assert "table" in caplog.text
