"""Layers as products are those layers."""

from dataclasses import dataclass
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import koi
from engine_toys import Fits, assert_agree, conv, trained
from koi.inner.compiled.layers import layers_as_products, linear_product, patches_product
from koi.inner.compiled.torch_internals import graph_pass

pytestmark = pytest.mark.usefixtures("float64")


@koi.tensor_task
@dataclass
class Oscillation:
    """u″ = −u at some times."""

    time: torch.Tensor

    def loss(self, model):
        def slope(time):
            return jvp(model, (time,), (torch.ones_like(time),))[1]

        curvature = jvp(slope, (self.time,), (torch.ones_like(self.time),))[1]
        return (curvature + model(self.time)).square().mean()


class Oscillations:
    def sample(self):
        return Oscillation(torch.rand(6, 1))


small = partial(st.integers, 1)


@st.composite
def convolutions(draw):
    """Draw an input, a weight, a bias or none, strides and paddings that fit together."""
    batch, channels, outputs = draw(small(3)), draw(small(3)), draw(small(9))
    kernel, stride = [(draw(small(4)), draw(small(4))) for _ in range(2)]
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    size = draw(small(9)), draw(small(9))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    bias = normal(outputs) if draw(st.booleans()) else None
    return normal(batch, channels, *size), normal(outputs, channels, *kernel), bias, stride, padding


def check_values_and_gradients(functions, tensors, *settings):
    """Compare values, gradients and a gradient of these."""
    given = [t.requires_grad_() for t in tensors if t is not None]
    results, direction = [], torch.randn_like(functions[0](*tensors, *settings))
    for function in functions:
        output = function(*tensors, *settings)
        grads = torch.autograd.grad((output.sin() * direction).sum(), given, create_graph=True)
        total = sum(g.square().sum() for g in grads)
        results.append([output, *grads, *torch.autograd.grad(total, given)])
    torch.testing.assert_close(*results)


@given(convolutions())
@settings(max_examples=60)
def test_convolution(case):
    *tensors, stride, padding = case
    check_values_and_gradients((patches_product, F.conv2d), tensors, stride, padding)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 4), (4, 1), (1, 1)])
def test_linear(sizes, bias, shape):
    num_in, num_out = sizes
    tensors = torch.randn(*shape, num_in), torch.randn(num_out, num_in), None
    if bias:
        tensors = *tensors[:2], torch.randn(num_out)
    check_values_and_gradients((linear_product, F.linear), tensors)


@given(convolutions())
@settings(max_examples=30)
def test_weights_of_each_task(case):
    """Under vmap, with the gradient inside, as an engine calls it."""
    input, weight, bias, stride, padding = case
    inputs, weights = (torch.stack([t, t.flip(0) - 1, 2 * t]) for t in (input, weight))
    kernels, results = [patches_product, F.conv2d], []
    for function in kernels:

        def loss(weight, input, function=function):
            return function(input, weight, bias, stride, padding).sin().sum()

        results.append(
            [vmap(loss)(weights, inputs), vmap(grad(loss, argnums=(0, 1)))(weights, inputs)]
        )
    torch.testing.assert_close(*results)


@given(convolutions())
@settings(max_examples=20)
def test_one_example_without_a_batch(case):
    input, *others = case
    torch.testing.assert_close(patches_product(input[0], *others), F.conv2d(input[0], *others))


def test_memory_format():
    output = patches_product(torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), None, (1, 1), (1, 1))
    assert output.is_contiguous(memory_format=torch.channels_last)


class Subclass(nn.Conv2d):
    """Does something else with its input."""

    def forward(self, input):
        return super().forward(input).abs()


KINDS = {
    "plain": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "stride": lambda: nn.Conv2d(4, 4, (3, 1), stride=(2, 1), bias=False),
    "same": lambda: nn.Conv2d(4, 4, 3, padding="same"),
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "dilation": lambda: nn.Conv2d(4, 4, 3, dilation=2),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "subclass": lambda: Subclass(4, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "linear": lambda: nn.Linear(8, 3),
    "one output": lambda: nn.Linear(8, 1, bias=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)),
}
PRODUCTS = {"plain": "_conv_forward", "stride": "_conv_forward"} | dict.fromkeys(
    ["linear", "one output"], "forward"
)


@pytest.mark.parametrize("name", KINDS)
def test_modules(name):
    net = nn.Sequential(KINDS[name](), nn.ReLU())
    input = torch.randn(2, 4, 7, 8)
    expected = net(input)
    layers_as_products(net)
    torch.testing.assert_close(net(input), expected)
    replaced = {"forward", "_conv_forward"} & vars(net[0]).keys()
    assert replaced == ({PRODUCTS[name]} if name in PRODUCTS else set())


@pytest.mark.parametrize(("together", "calls"), [(False, 1), (True, 2)])
def test_large_images_of_one_task_are_left_to_torch(together, calls, monkeypatch):
    """Their patches would leave the cache before they are multiplied."""
    gathered = Mock(wraps=patches_product)
    monkeypatch.setattr("koi.inner.compiled.layers.patches_product", gathered)
    net = nn.Conv2d(4, 2, 3, padding=1)
    layers_as_products(net, together=together)
    for input in torch.randn(5, 4, 30, 30), torch.randn(5, 4, 60, 60):
        expected = F.conv2d(input, net.weight, net.bias, padding=1)
        torch.testing.assert_close(net(input), expected)
    assert gathered.call_count == calls


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.usefixtures("float64", "traced")
def test_training_on_large_images_is_as_without_the_compiler(algorithm, monkeypatch):
    monkeypatch.setattr("koi.inner.compiled.layers._MOST_PATCHES", 0)
    settings = {"algorithm": algorithm, "num_iterations": 2, "num_steps": 2}
    start, tasks = conv(), Fits((1, 4, 4))
    eager, compiled = (trained(e, start, tasks, **settings) for e in ("eager", "compiled"))
    assert_agree(compiled, eager)


@pytest.mark.parametrize("name", PRODUCTS)
def test_modules_in_autocast(name):
    net = nn.Sequential(KINDS[name](), nn.ReLU()).float()
    input = torch.randn(2, 4, 7, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(input)
        layers_as_products(net)
        actual = net(input)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("sizes", "remaining"), [((5, 10, 7), 0), ((5, 11, 7), 2), ((800, 10, 9), 2), ((5, 1, 7), 0)]
)
def test_small_products_are_written_out(sizes, remaining):
    rows, terms, columns = sizes
    left, right = torch.randn(3, rows, terms), torch.randn(3, terms, columns)

    def products(left, right):
        return left @ right, left[0] @ right[0]

    traced = make_fx(products, tracing_mode="fake")(left, right)
    graph_pass(products=True)["post_grad_custom_pre_pass"](traced.graph)
    traced.recompile()
    targets = [node.target for node in traced.graph.nodes]
    matrix_products = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
    assert sum(target in matrix_products for target in targets) == remaining
    torch.testing.assert_close(traced(left, right), products(left, right))


SLICES = {
    "one dimension": (lambda x: x[1:3].sin(), 0),
    "two": (lambda x: x[:2, 1:].sin(), 0),
    "several that overlap": (lambda x: x[:2, 1:].sin() + 2 * x[1:, :-1].cos(), 0),
    "one that is used twice": (lambda x: x[1:][:, 1:].sin(), 0),
    "every second": (lambda x: x[:, ::2].sin(), 1),
}


@pytest.mark.parametrize("name", SLICES)
def test_gradients_of_slices_are_padded(name):
    function, remaining = SLICES[name]
    slope, input = grad(lambda x: function(x).sum()), torch.randn(3, 4)
    table = torch._decomp.core_aten_decompositions()
    traced = make_fx(slope, decomposition_table=table, tracing_mode="fake")(input)
    graph_pass(products=True)["post_grad_custom_pre_pass"](traced.graph)
    traced.recompile()
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(torch.ops.aten.slice_scatter.default) == remaining
    torch.testing.assert_close(traced(input), slope(input))


# torch warns of itself where a derivative forward is first traced
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("products", [True, False])
def test_zeros_have_memory(products):
    """A tangent that is zero is a ZeroTensor, which code that is made of a graph cannot read."""

    def second_derivative(t):
        def slope(t):
            return jvp(lambda t: 2 * t, (t,), (torch.ones_like(t),))[1]

        return jvp(slope, (t,), (torch.ones_like(t),))[1]

    traced = make_fx(second_derivative, tracing_mode="fake")(torch.ones(2, 3))
    zero = torch.ops.aten._efficientzerotensor.default
    assert zero in [node.target for node in traced.graph.nodes]
    graph_pass(products=products)["post_grad_custom_pre_pass"](traced.graph)
    traced.recompile()
    assert zero not in [node.target for node in traced.graph.nodes]
    found = traced(torch.ones(2, 3))
    assert found.data_ptr() != 0
    assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_derivative_of_a_derivative_compiles():
    """By Inductor in earnest, whose code without that pass ended the process."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    compiled, eager = (
        trained(engine, model, Oscillations(), num_iterations=2, num_steps=2)
        for engine in ("vectorized+compiled", "eager")
    )
    assert_agree(compiled, eager)
