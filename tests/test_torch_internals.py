"""Private names of torch: two files have them, and Koi does without each."""

import ast
import gc
import operator
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.codecache
import torch._inductor.codegen.cpp
import torch._inductor.graph
import torch._inductor.sizevars
import torch._inductor.utils

from engine_toys import Fits, assert_agree, mlp, trained
from koi import ConfigurationError, EngineError, Koi
from koi.inner.compiled import torch_internals
from koi.inner.compiled.compiler import said_when_long

PACKAGE = Path(__file__).parent.parent / "src" / "koi"
HOMES = {PACKAGE / "inner" / "compiled" / name for name in ("torch_internals.py", "products.py")}


def private_names(tree):
    """Yield what begins at torch and goes through a name with an underscore in front."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, inner = ast.unparse(node), node
            while isinstance(inner, ast.Attribute):
                inner = inner.value
            if not isinstance(inner, ast.Name):
                continue
        elif isinstance(node, ast.ImportFrom):
            name = ".".join([node.module or "", *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            name = node.names[0].name
        else:
            continue
        root, *parts = name.split(".")
        private = [p for p in parts if p.startswith("_") and not p.startswith(("__", "_foreach_"))]
        if root == "torch" and private:
            yield name


def test_they_live_in_two_files():
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path not in HOMES
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


MISSING = [
    (torch._C._dynamo.eval_frame, "_debug_get_cache_entry_list"),
    (torch._dynamo, "mark_static_address"),
    (torch._inductor, "list_mode_options"),
]


@pytest.mark.parametrize("number", ["2.6.0", "2.10.1", "99.0.0", "3.1.0+cpu"])
def test_a_torch_that_nobody_tried_is_refused(number, monkeypatch):
    monkeypatch.setattr(torch, "__version__", number)
    with pytest.raises(ConfigurationError) as caught:
        Koi(mlp(), compile=True)
    assert f"this is torch {number}: install one of these, or use compile=False" in str(
        caught.value
    )
    assert Koi(mlp(), num_iterations=1).train(Fits()) is not None


@pytest.mark.parametrize("number", ["2.11.0", "2.13.0+cpu", "2.14.1"])
def test_those_that_were_tried_are_taken(number, monkeypatch):
    monkeypatch.setattr(torch, "__version__", number)
    torch_internals.check_version(True)


def test_what_takes_long_says_so(monkeypatch, caplog):
    """Where nobody sees what is said at level INFO, a silent minute looks like a hang."""
    monkeypatch.setattr("koi.inner.compiled.compiler._LONG", 0.01)
    with said_when_long("the inner loop of one task"):
        while not caplog.records:
            time.sleep(0.01)
    assert "compiling the inner loop of one task has taken" in caplog.text
    caplog.clear()
    monkeypatch.setattr("koi.inner.compiled.compiler._LONG", 1000)
    with said_when_long("another"):
        pass
    assert not caplog.records


def test_a_quick_build_is_over_when_it_ends():
    """What others compile is built as they expect."""
    builder, sizes = torch._inductor.cpp_builder, torch._inductor.sizevars
    places = [
        (builder, "_get_optimization_cflags"),
        (sizes, "sympy"),
        (torch._inductor.graph.GraphLowering, "run_node"),
        (torch._inductor.graph.GraphLowering, "register_users_of"),
        (torch._inductor.cpu_vec_isa, "valid_vec_isa_list"),
        (torch._inductor.codecache, "_worker_compile_cpp"),
    ]
    before = [getattr(*place) for place in places]
    with torch_internals.quick_build("cpu"):
        assert not any(map(operator.is_, before, [getattr(*place) for place in places]))
        assert "O2" in builder._get_optimization_cflags("g++")[0]
        x, y = sizes.sympy.symbols("x y")
        assert sizes.sympy.simplify(49 * (x + 1) + y - (49 * x + y)) == 49
        assert sizes.sympy.gcd(4, 6) == 2
        assert not gc.isenabled()
    assert all(map(operator.is_, before, [getattr(*place) for place in places]))
    assert gc.isenabled()


def test_what_is_read_is_computed_before_it_is_overwritten():
    """Before, in another order than it is overwritten, and after that again."""

    def step(x, y):
        double, backwards = 2 * x, x.flip(0)
        y.copy_(double.sqrt())
        x.copy_(backwards)
        return double + 1, x * y

    def given():
        return torch.arange(1.0, 20.0), torch.zeros(19)

    ours, plain = given(), given()
    fresh = torch._inductor.utils.fresh_cache()
    with fresh, torch_internals.quick_build("cpu"):
        found = torch.compile(step, fullgraph=True)(*ours)
    for got, expected in zip((*found, *ours), (*step(*plain), *plain), strict=True):
        torch.testing.assert_close(got, expected)


class TestMissing:
    @pytest.fixture(autouse=True)
    def none_of_them(self, monkeypatch):
        for place, name in MISSING:
            monkeypatch.delattr(place, name)

    def test_what_is_said_instead(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
        monkeypatch.delattr(torch._inductor.codegen.cpp.CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM")
        function = torch_internals.sum_of_terms
        assert not torch_internals.has_graph(function)
        assert torch_internals.without_lookup(function) is None
        monkeypatch.delattr(torch._inductor.cpp_builder, "_get_optimization_cflags")
        monkeypatch.delattr(torch._inductor.sizevars, "sympy")
        monkeypatch.delattr(torch._inductor.graph.GraphLowering, "register_users_of")
        monkeypatch.delattr(torch._inductor.codecache, "_worker_compile_cpp")
        monkeypatch.delattr(
            torch.fx.passes._tensorify_python_scalars, "_is_tensorify_enabled", raising=False
        )
        with torch_internals.kernels_apart(), torch_internals.quick_build("cpu"):
            pass
        with torch_internals.scalars_kept():
            pass
        torch_internals.at_fixed_address(torch.zeros(1))
        assert torch_internals.options_of("reduce-overhead") == {"triton.cudagraphs": True}
        with pytest.raises(EngineError, match="mode 'max-autotune' means: use compile=True"):
            torch_internals.options_of("max-autotune")
        assert torch_internals.graph_pass(products=True) == {}

    @pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
    @pytest.mark.usefixtures("float64")
    def test_the_numbers_are_the_same(self, how, request):
        if how == "traced":
            request.getfixturevalue("traced")
        start, tasks = mlp(), Fits()
        settings = {"num_iterations": 3, "num_steps": 2}
        eager, compiled = (trained(e, start, tasks, **settings) for e in ("eager", "compiled"))
        assert_agree(compiled, eager)
