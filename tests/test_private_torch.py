"""What Koi uses of torch beyond its public names may go: then it is slower, and the same."""

import importlib

import pytest
import torch

from engine_toys import Fits, assert_agree, mlp, trained
from koi import EngineError
from koi.inner.compiled import private_torch

NAMES = {
    "graphs of a function": ("torch._C._dynamo.eval_frame", "_debug_get_cache_entry_list"),
    "functions of loops": ("torch._inductor.codegen.cpp", "CppScheduling"),
    "how many loops": (
        "torch._inductor.codegen.cpp",
        "CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM",
    ),
    "recurrence": ("torch._dynamo", "config"),
    "addresses": ("torch._dynamo", "mark_static_address"),
    "modes": ("torch._inductor", "list_mode_options"),
    "passes": ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
    "patterns": ("torch._inductor.pattern_matcher", "register_graph_pattern"),
}


@pytest.fixture
def missing(monkeypatch):
    """Return a function that makes `private_torch` find a name no longer."""
    real = private_torch._found

    def take(module, name):
        owner, _, attribute = name.partition(".")
        if attribute:
            monkeypatch.delattr(getattr(importlib.import_module(module), owner), attribute)
        monkeypatch.setattr(
            private_torch,
            "_found",
            lambda *asked: None if asked == (module, name) else real(*asked),
        )
        private_torch.small_products_pass.cache_clear()

    yield take
    private_torch.small_products_pass.cache_clear()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_each_is_there(name):
    """In the torch of today: else what it saves is lost without a word."""
    assert private_torch._found(name[0], name[1].split(".")[0]) is not None


@pytest.mark.usefixtures("float64", "traced")
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_without_one_the_numbers_are_the_same(name, engine, missing):
    missing(*name)
    start, settings = mlp(), {"inner_optimizer": "adam", "num_iterations": 2}
    with private_torch.kernels_apart(), private_torch.recurrence_traced():
        learner = trained(engine, start, Fits(), **settings)
    assert_agree(learner, trained("eager", start, Fits(), **settings))


def test_without_the_modes_cuda_graphs_are_known(missing):
    missing(*NAMES["modes"])
    assert private_torch.mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    with pytest.raises(EngineError, match="mode 'max-autotune' means: use compile=True"):
        private_torch.mode_options("max-autotune")


@pytest.mark.parametrize("name", ["passes", "patterns"])
def test_without_the_pass_the_compiler_is_given_none(name, missing):
    missing(*NAMES[name])
    assert private_torch.small_products_pass() is None


def test_without_marks_a_tensor_is_left_alone(missing):
    missing(*NAMES["addresses"])
    private_torch.keep_address(tensor := torch.zeros(1))
    assert not vars(tensor)
