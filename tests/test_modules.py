"""Any module can be meta-learned, and only what should change in it changes."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import naive
from koi import Koi, ModelError
from toys import InTurn, Regression, Regressions, assert_close, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.05, "num_steps": 3, "num_iterations": 3, "meta_step_size": 0.4}


class Frozen(nn.Sequential):
    """The first layer does not learn."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self[0].requires_grad_(False)


class Unused(nn.Sequential):
    """A parameter that no loss depends on."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2))
        self.unused = nn.Parameter(torch.ones(3))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outward.weight = self.inward.weight

    def forward(self, x):
        return self.outward(self.inward(x).tanh())[:, :2]


class Recurrent(nn.Module):
    """Reads the three inputs as a sequence."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(2))[0][:, -1])


class Attentive(nn.Module):
    """A transformer layer over the three inputs, with dropout."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.unsqueeze(2))).mean(1))


class Lists(nn.Module):
    """Parameters in a list and in a dictionary, and a scalar one."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 4), torch.randn(4, 2)])
        self.biases = nn.ParameterDict({"a": torch.randn(4), "b": torch.randn(2)})
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        hidden = (x @ self.weights[0] + self.biases["a"]).tanh()
        return self.scale * (hidden @ self.weights[1] + self.biases["b"])


def net(*layers):
    # no bias: in front of a normalisation its gradient is rounding noise
    return nn.Sequential(nn.Linear(3, 4, bias=False), *layers, nn.Linear(4, 2))


# The bias of attention's keys has no gradient but noise either; a large eps keeps Adam from making
# full steps of that.
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": partial(torch.optim.Adam, eps=0.01)}


MODULES = {
    "frozen": Frozen,
    "unused": Unused,
    "tied": Tied,
    "batch norm": lambda: net(nn.BatchNorm1d(4)),
    "batch norm, cumulative": lambda: net(nn.BatchNorm1d(4, momentum=None)),
    "batch norm without statistics": lambda: net(nn.BatchNorm1d(4, track_running_stats=False)),
    "batch norm in evaluation mode": lambda: net(nn.BatchNorm1d(4)).eval(),
    "batch norm alone in evaluation mode": lambda: net(nn.BatchNorm1d(4).eval()),
    "layer norm": lambda: net(nn.LayerNorm(4)),
    "dropout": lambda: net(nn.Dropout(0.5)),
    "dropout in evaluation mode": lambda: net(nn.Dropout(0.5)).eval(),
    "lstm": Recurrent,
    "attention": Attentive,
    "weight norm": lambda: weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: orthogonal(nn.Linear(3, 2)),
    "lists": Lists,
    "lists in lists": lambda: nn.Sequential(*[nn.ModuleList([nn.Linear(3, 2)])[0]]),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODULES)
def test_steps_of_the_naive_twin(name, optimizer, algorithm):
    model = MODULES[name]()
    twin, start = deepcopy(model), deepcopy(model)
    settings = SETTINGS | {"meta_batch_size": 2, "algorithm": algorithm}
    settings["inner_optimizer"] = OPTIMIZERS[optimizer]
    torch.manual_seed(1)
    Koi(model, **settings).train(Regressions())
    torch.manual_seed(1)
    naive.meta_train(twin, Regressions(), **settings)
    assert_close(model, twin)
    for (which, param), before in zip(model.named_parameters(), start.parameters(), strict=True):
        learns = param.requires_grad and which != "unused"
        assert torch.equal(param, before) != learns, which


# Not among them: modules that draw or that move buffers which their output depends on, where
# central differences say nothing, and weight norm, whose second derivative torch 2.13 has wrong on
# the CPU (`torch.autograd.gradgradcheck` of `torch._weight_norm` fails).
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [
        "frozen",
        "unused",
        "tied",
        "batch norm",
        "batch norm without statistics",
        "batch norm in evaluation mode",
        "layer norm",
        "lstm",
        "attention",
        "lists",
    ],
)
def test_maml(name):
    model = MODULES[name]()
    if name == "attention":  # without dropout
        model.eval()
    twin = deepcopy(model)
    settings = SETTINGS | {"num_iterations": 1, "num_steps": 2, "algorithm": "maml"}
    task = Regression(torch.randn(6, 3), torch.randn(6, 2))
    Koi(model, **settings).train(InTurn(task))
    naive.meta_train(twin, InTurn(task), **settings)
    assert_close(model, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", torch.optim.RMSprop])
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_bfloat16(algorithm, optimizer):
    if algorithm == "maml" and callable(optimizer):
        optimizer = partial(torch.optim.SGD, momentum=0.9)
    model = small_net().bfloat16()
    task = Regression(torch.randn(6, 3).bfloat16(), torch.randn(6, 2).bfloat16())
    before = task.loss(model).item()
    settings = SETTINGS | {"num_iterations": 10, "meta_batch_size": 2, "step_size": 0.01}
    Koi(model, inner_optimizer=optimizer, algorithm=algorithm, **settings).train(InTurn(task))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert task.loss(model).item() < before


def test_mixed_precision_inside_one_module():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.second(self.first(x.bfloat16()).double()).float()

    model = Mixed()
    before = snapshot(model)
    Koi(model, meta_batch_size=2, **SETTINGS).train(Regressions())
    after = snapshot(model)
    assert [t.dtype for t in after.values()] == [t.dtype for t in before.values()]
    assert not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("output", ["tuple", "dict"])
def test_module_that_returns_more_than_a_tensor(output):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            y = self.net(x)
            return (y, x) if output == "tuple" else {"prediction": y, "input": x}

    class Task(Regression):
        def loss(self, model):
            result = model(self.inputs)
            prediction = result[0] if output == "tuple" else result["prediction"]
            return (prediction - self.targets).square().mean()

    model = Two()
    plain = deepcopy(model.net)
    data = torch.randn(6, 3), torch.randn(6, 2)
    koi = Koi(model, **SETTINGS)
    koi.train(InTurn(Task(*data)))
    Koi(plain, **SETTINGS).train(InTurn(Regression(*data)))
    assert_close(model.net, plain, rtol=1e-6, atol=1e-7)
    assert type(koi(data[0])) is (tuple if output == "tuple" else dict)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_module_already_compiled(algorithm):
    torch._dynamo.reset()
    plain = net(nn.BatchNorm1d(4), nn.Tanh())
    model = deepcopy(plain)
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    koi = Koi(compiled, algorithm=algorithm, **SETTINGS)
    assert koi.train(Regressions()) is compiled
    torch.manual_seed(1)
    Koi(plain, algorithm=algorithm, **SETTINGS).train(Regressions())
    assert_close(model, plain)
    assert_same(compiled, {f"_orig_mod.{name}": value for name, value in snapshot(model).items()})
    x = torch.randn(6, 3)
    torch.testing.assert_close(koi.adapt(Regressions().sample())(x).shape, (6, 2))
    torch._dynamo.reset()


def test_sparse_gradients():
    class Task:
        def loss(self, model):
            return model(torch.tensor([1, 1, 3])).square().sum()

    model, dense = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2)
    dense.load_state_dict(model.state_dict())
    for each in (model, dense):
        Koi(each, meta_batch_size=2, **SETTINGS).train(InTurn(Task()))
    assert_close(model, dense, rtol=1e-6, atol=1e-7)


class TestModulesThatCannotBeLearned:
    """The error says what is wrong and what to do, when the learner is made."""

    @pytest.mark.parametrize(
        "model", [nn.Tanh(), nn.Sequential(), nn.Linear(1, 1).requires_grad_(False)]
    )
    def test_nothing_to_learn(self, model):
        with pytest.raises(ModelError, match="no parameter that can learn"):
            Koi(model)

    @pytest.mark.parametrize(
        "make", [lambda: nn.LazyLinear(2), lambda: nn.LazyBatchNorm1d(affine=False)]
    )
    def test_lazy(self, make):
        model = nn.Sequential(nn.Linear(3, 3), make())
        with pytest.raises(ModelError, match=r"lazy .* run one batch through it"):
            Koi(model)
        targets = torch.zeros_like(model(torch.randn(4, 3)))
        Koi(model, num_iterations=1).train(InTurn(Regression(torch.randn(4, 3), targets)))

    @pytest.mark.parametrize("attribute", ["computed tensor", "generator"])
    def test_cannot_be_copied(self, attribute):
        model = small_net()
        if attribute == "computed tensor":
            model.last = model(torch.randn(1, 3))
        else:
            model.stream = (n for n in range(3))
        with pytest.raises(ModelError, match="cannot be copied"):
            Koi(model, num_iterations=1).train(Regressions())
