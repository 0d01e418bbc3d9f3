"""LSTM, GRU, RNN and their cells, mapped over tasks, are torch's own."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from koi.inner.layers.recurrence import LSTMKernel, map_recurrence
from koi.randomness import capture, same_states

STEPS, BATCH, INPUTS, HIDDEN, TASKS = 3, 2, 3, 5, 3
LAYERS = {
    "lstm": nn.LSTM,
    "lstm with projections": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu rnn": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm cell": nn.LSTMCell,
    "gru cell": nn.GRUCell,
    "rnn cell": nn.RNNCell,
    "relu rnn cell": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
LSTM = nn.LSTM, nn.LSTMCell


def mapped(module, kernel=False):
    """Return a copy that can be mapped over tasks."""
    copied = deepcopy(module)
    map_recurrence(copied, kernel=kernel)
    return copied


def layer_inputs(layer, batched=True):
    """Return random inputs and an initial state for a layer."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = (BATCH,) if batched else ()
    shape = (*batch, STEPS) if layer.batch_first else (STEPS, *batch)
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    state = (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, LSTM) else h
    return torch.randn(*shape, INPUTS), state


def cell_inputs(cell, batched=True):
    """Return a random input and a state for a cell."""
    shape = (BATCH,) if batched else ()
    state = torch.randn(*shape, HIDDEN)
    state = (state, torch.randn(*shape, HIDDEN)) if isinstance(cell, LSTM) else state
    return torch.randn(*shape, INPUTS), state


def check_values_and_derivatives(module, *arguments):
    """Compare what a module and its mapped copy return, layouts too, and both derivatives."""
    results, layouts = [], []
    copied = mapped(module)
    assert "forward" in vars(copied)
    given = [t.requires_grad_() for t in tree_leaves(arguments)]
    for which in (module, copied):
        leaves = [*which.parameters(), *given]
        result = which(*arguments)
        outputs = tree_leaves(result)
        total = sum(output.sin().sum() for output in outputs)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)
        results.append([result, grads, again])
        layouts.append([output.stride() for output in outputs])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    assert layouts[0] == layouts[1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("num_layers", "bidirectional"), [(1, False), (1, True), (2, False), (2, True)]
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer(kind, bias, batch_first, num_layers, bidirectional):
    """With and without a batch, and an initial state."""
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    layer = LAYERS[kind](INPUTS, HIDDEN, num_layers, **options)
    check_values_and_derivatives(layer, *layer_inputs(layer))
    copied = mapped(layer)
    for batched in (True, False):
        input, state = layer_inputs(layer, batched)
        for given in ((input,), (input, state)):
            torch.testing.assert_close(copied(*given), layer(*given), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cell(kind, bias, batched):
    cell = CELLS[kind](INPUTS, HIDDEN, bias=bias)
    input, state = cell_inputs(cell, batched)
    check_values_and_derivatives(cell, input, state)
    check_values_and_derivatives(cell, input)


def assert_maps(module, copied, input, tolerance):
    """Compare each task's loss and gradients, taken inside of vmap and outside, as engines do."""
    inputs = torch.randn(TASKS, *input.shape)
    params = {
        name: torch.rand(TASKS, *p.shape).sub_(0.5).requires_grad_()
        for name, p in module.named_parameters()
    }

    def loss_of(module, params, input):
        outputs = tree_leaves(functional_call(module, params, (input,)))
        return sum(output.sin().sum() for output in outputs)

    rows = [{name: p[task] for name, p in params.items()} for task in range(TASKS)]
    losses = torch.stack([loss_of(module, *row) for row in zip(rows, inputs, strict=True)])
    grads = torch.autograd.grad(losses.sum(), list(params.values()))

    def loss(params, input):
        return loss_of(copied, params, input)

    together = vmap(loss)(params, inputs)
    outside = torch.autograd.grad(together.sum(), list(params.values()))
    inside = vmap(grad(loss))(params, inputs)
    expected = losses, list(grads), list(grads)
    actual = together, list(outside), list(inside.values())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_weights_of_each_task(kind):
    if kind in LAYERS:
        module = LAYERS[kind](INPUTS, HIDDEN, 2, bidirectional=True)
        input, _ = layer_inputs(module)
    else:
        module = CELLS[kind](INPUTS, HIDDEN)
        input, _ = cell_inputs(module)
    assert_maps(module, mapped(module), input, 1e-10)


class TestKernel:
    """An LSTM in float32 on the CPU is torch's own, for one task after the other."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("batched", [True, False])
    def test_weights_of_each_task(self, batched, batch_first, bias):
        options = {"bias": bias, "batch_first": batch_first, "bidirectional": True}
        layer = nn.LSTM(INPUTS, HIDDEN, 2, **options)
        input, state = layer_inputs(layer, batched)
        copied = mapped(layer, kernel=True)
        torch.testing.assert_close(copied(input, state), layer(input, state))
        assert_maps(layer, copied, input, 1e-5)

    def test_where_it_runs(self, monkeypatch):
        calls = []
        monkeypatch.setattr(LSTMKernel, "apply", lambda *inputs: calls.append(inputs) or inputs[1:])
        layer = nn.LSTM(INPUTS, HIDDEN, 2, dropout=0.5)
        input, _ = layer_inputs(layer)
        with torch.autocast("cpu", torch.bfloat16):
            mapped(layer.eval(), kernel=True)(input)
        mapped(layer.eval(), kernel=False)(input)
        mapped(layer.train(), kernel=True)(input)  # draws
        mapped(layer.eval().double(), kernel=True)(input.double())
        mapped(nn.GRU(INPUTS, HIDDEN), kernel=True)(input)
        mapped(nn.LSTM(INPUTS, HIDDEN, proj_size=2), kernel=True)(input)
        assert not calls
        mapped(nn.LSTM(INPUTS, HIDDEN), kernel=True)(input)
        assert len(calls) == 1


class TestDropout:
    """It is between the layers, and in training mode only."""

    @pytest.fixture
    def inputs(self):
        return torch.randn(STEPS, BATCH, INPUTS)

    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("dropout", [0.3, 1.0])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_draws_of_torch(self, kind, dropout, inputs):
        """In the precision in which torch itself composes the layer of plain operations."""
        layer = LAYERS[kind](INPUTS, HIDDEN, 3, dropout=dropout, bidirectional=True)
        results = []
        for which in (layer, mapped(layer)):
            torch.manual_seed(1)
            results.append(which(inputs))
        torch.testing.assert_close(*results, rtol=0, atol=1e-10)
        torch.testing.assert_close(mapped(layer.eval())(inputs), layer(inputs))

    @pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, False)])
    def test_nothing_is_drawn(self, dropout, training, inputs):
        layer = mapped(nn.GRU(INPUTS, HIDDEN, 2, dropout=dropout).train(training))
        before = capture()
        layer(inputs)
        assert same_states(before, capture())

    def test_share_that_is_dropped(self):
        """The second layer adds up a thousand outputs that are 1, or 0 where dropped."""
        layer = nn.RNN(1, 1000, 2, dropout=0.25, nonlinearity="relu", bias=False)
        for name, weight in layer.named_parameters():
            nn.init.constant_(weight, 0 if "hh" in name else 1)
        outputs, _ = mapped(layer)(torch.ones(1, 1))
        # a mean of 1000, with a standard deviation of √(1000 · 0.25 / 0.75) = 18
        assert 0 < (outputs[0, 0] - 1000).abs() < 6 * 18

    def test_each_task_draws_its_own(self, inputs):
        layer = mapped(nn.LSTM(INPUTS, HIDDEN, 2, dropout=0.5))
        outputs = vmap(lambda x: layer(x)[0], randomness="different")(inputs.expand(2, -1, -1, -1))
        assert not torch.equal(*outputs)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_autocast(kind, grad_mode):
    """The same types, and the same values up to rounding, whatever the types of what is given."""
    module = (LAYERS | CELLS)[kind](INPUTS, HIDDEN)
    input, state = (layer_inputs if kind in LAYERS else cell_inputs)(module)
    low = tuple(s.bfloat16() for s in state) if isinstance(state, tuple) else state.bfloat16()
    for given in (input, input.bfloat16()):
        for hx in (None, state, low):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad_mode):
                actual, expected = mapped(module)(given, hx), module(given, hx)
            torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("module", "shapes", "words"),
    [
        (nn.LSTM(INPUTS, HIDDEN), [(STEPS, BATCH, 7)], "must be equal to input_size"),
        (nn.RNN(INPUTS, HIDDEN), [(INPUTS,)], r"\(T, N, C\)"),
        (nn.GRU(INPUTS, HIDDEN), [(2, 2, 2, INPUTS)], r"\(T, C\)"),
        (nn.GRU(INPUTS, HIDDEN), [(STEPS, BATCH, INPUTS), (1, 1, HIDDEN)], "hidden size"),
        (nn.GRU(INPUTS, HIDDEN), [(STEPS, INPUTS), (1, 1, HIDDEN)], "hidden size"),
        (nn.GRUCell(INPUTS, HIDDEN), [(BATCH, INPUTS), (1, HIDDEN)], r"\(N, 5\)"),
        (nn.RNNCell(INPUTS, HIDDEN), [(1, BATCH, INPUTS)], r"\(N, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(module, shapes, words):
    """A state that would be broadcast among them."""
    tensors = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, ValueError)):
        module(*tensors)
    with pytest.raises((RuntimeError, ValueError), match=words):
        mapped(module)(*tensors)


class Doubled(nn.LSTM):
    """A layer that is not torch's own."""

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


def test_what_is_not_plain_stays_as_it_is():
    own = nn.GRU(INPUTS, HIDDEN)
    own.forward = lambda input: input
    net = nn.ModuleList([Doubled(INPUTS, HIDDEN), own, nn.Linear(INPUTS, HIDDEN)])
    before = [dict(vars(part)) for part in net]
    map_recurrence(net, kernel=True)
    assert [vars(part) for part in net] == before
