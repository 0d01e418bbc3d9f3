"""Products by oneDNN's kernels are those products, in whatever order the numbers lie."""

import itertools
import sys
from functools import partial

import pytest
import torch
import torch._inductor.utils
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from engine_toys import ENGINES, Fits
from koi import Koi
from koi.inner.compiled import products
from koi.inner.compiled.compiler import options_for
from koi.inner.compiled.torch_internals import graph_pass

needs_kernels = pytest.mark.skipif(
    not products.has_kernels(), reason="this processor has no AVX-512, or torch no such kernels"
)
SIZES = [(20, 30, 40), (1, 30, 17), (17, 18, 1)]  # rows, terms, columns


def matrices(batch, rows, columns, order):
    """Return matrices of which rows, columns, every second row, or one for all lie in memory."""
    shape = [batch] if batch else []
    if order == "columns":
        return torch.randn(*shape, columns, rows).mT
    if order == "every second row":
        return torch.randn(*shape, 2 * rows, columns + 3)[..., ::2, 2:-1]
    if order == "one for all":
        return torch.randn(rows, columns).expand(*shape, rows, columns)
    if order == "one row":
        return torch.randn(*shape, 1, columns).expand(*shape, rows, columns)
    return torch.randn(*shape, rows, columns)


ORDERS = ["rows", "columns", "every second row", "one for all", "one row"]


def check(pairs):
    """Compare products with those in float64, and return their C++."""

    def products_of(pairs):
        return [left @ right for left, right in pairs]

    found, code = compiled(products_of, [pairs])
    expected = [(left.double() @ right.double()).float() for left, right in pairs]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert code.count("    koi_products(") == len(pairs)
    return code


def compiled(function, given):
    """Return what its graph gives and the C++ of it."""
    options = options_for("cpu", True)
    graph = torch.compile(function, fullgraph=True, options=options)
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        return torch._inductor.utils.run_and_get_cpp_code(graph, *given)


@needs_kernels
def test_all_orders():
    cases = itertools.product((0, 3), SIZES, ORDERS, ORDERS)
    pairs = [
        (matrices(batch, m, k, left), matrices(batch, k, n, right))
        for batch, (m, k, n), left, right in cases
    ]
    check(pairs)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_rows(threads, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    code = check([(torch.randn(batch, 90, 100), torch.randn(batch, 100, 80)) for batch in (1, 4)])
    assert code.count(f", {threads});\n") == 2


@needs_kernels
def test_what_is_computed_in_the_graph_may_lie_in_any_order():
    """Read as rows by one product, as columns by another, and by what is no product."""

    def several(x, y):
        active = (x + 1).tanh()
        forward = active @ y
        biased = torch.addmm(active.sum(0), forward, active)
        return forward, active.mT @ forward.relu(), biased

    x, y = torch.randn(30, 20), torch.randn(20, 30)
    found, code = compiled(several, (x, y))
    for got, expected in zip(found, several(x.double(), y.double()), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    assert code.count("    koi_products(") == 3


def test_a_weight_is_transposed_once_for_all_steps_of_a_loop():
    def steps(x, weight):
        for _ in range(3):
            x = (x @ weight.mT).tanh()
        return x, x @ weight

    given = torch.randn(20, 30), torch.randn(30, 30)
    table = torch._decomp.core_aten_decompositions()
    traced = make_fx(steps, decomposition_table=table, tracing_mode="fake")(*given)
    products.multiply(traced.graph)
    traced.graph.lint()
    traced.recompile()
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(torch.ops.koi.product.default) == 4
    assert targets.count(torch.ops.aten.clone.default) == 1
    torch.testing.assert_close(traced(*given), steps(*given))


@needs_kernels
@pytest.mark.parametrize(
    ("engine", "algorithm"), [("compiled", "maml"), ("vectorized+compiled", "reptile")]
)
def test_engines_agree(engine, algorithm):
    """In float32, of which the products are, where others compare in float64."""
    found = []
    for name in (engine, "eager"):
        vectorize, compile = ENGINES[name]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2))
        koi = Koi(
            *(model, 0.1, 3),
            num_iterations=3,
            meta_batch_size=3,
            algorithm=algorithm,
            vectorize=vectorize,
            compile=compile,
            seed=0,
        )
        koi.train(Fits((20,)))
        assert koi.engine == name
        found.append(koi.model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_a_processor_without_them_takes_torchs(monkeypatch):
    """And finds no graph that another processor has left in the compiler's cache."""
    known = graph_pass(products=True)["post_grad_custom_pre_pass"].uuid()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    products.has_kernels.cache_clear()
    try:
        assert not products.has_kernels()
        assert graph_pass(products=True)["post_grad_custom_pre_pass"].uuid() != known
        left, right = torch.randn(20, 30), torch.randn(30, 40)
        found, code = compiled(torch.matmul, (left, right))
        torch.testing.assert_close(found, left @ right)
        assert "koi_products" not in code
    finally:
        monkeypatch.undo()
        products.has_kernels.cache_clear()
    assert products.has_kernels()


def test_a_compiler_without_a_place_for_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", None)
    assert not products._have_code()
