"""What Koi does on a GPU, as far as a machine without one can show."""

import random

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from engine_toys import Fits, assert_agree, mlp, trained
from koi import EngineError, Koi
from koi.inner.compiled.compiler import options_for
from koi.inner.compiled.engine import CompiledEngine
from koi.inner.compiled.functions import InnerFunctions
from koi.randomness import Place, capture, restore, set_generators
from koi.sampling import draw


class TestCudaGraphs:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            (True, {"triton.cudagraphs": True}),
            ("reduce-overhead", {"triton.cudagraphs": True}),
            ("max-autotune-no-cudagraphs", {"max_autotune": True}),
        ],
    )
    def test_options(self, mode, expected):
        options = options_for("cuda", mode)
        assert expected.items() <= options.items()
        assert options["loop_ordering_after_fusion"] is False  # else Inductor of torch 2.11 fails
        assert not any(name.startswith("cpp") for name in options)
        on_cpu = options_for("cpu", True)
        assert on_cpu["cpp_wrapper"]
        assert "loop_ordering_after_fusion" not in on_cpu

    @pytest.mark.usefixtures("float64", "untraced")
    @pytest.mark.parametrize("written_out", [64, 0])
    @pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
    @pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
    def test_fixed_memory(self, engine, algorithm, written_out, monkeypatch):
        """A CUDA graph always writes its results, and finds what it changes, at one address."""
        start, tasks = mlp(), Fits()
        settings = {"inner_optimizer": "adam", "num_iterations": 4, "algorithm": algorithm}
        eager = trained("eager", start, tasks, **settings)
        monkeypatch.setattr("koi.inner.compiled.compiler.Graph.__call__", overwriting)
        monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", written_out)
        monkeypatch.setattr("koi.inner.compiled.graphs.InnerFunctions", on_cuda(InnerFunctions))
        make = CompiledEngine.__init__

        def engine_on_cuda(self, *args, **settings):
            make(self, *args, **settings)
            self.device = torch.device("cuda")

        monkeypatch.setattr(CompiledEngine, "__init__", engine_on_cuda)
        learner = trained(engine, start, tasks, **settings)
        assert_agree(learner, eager)
        curves = [each.evaluate(tasks, 5, num_steps=4).losses for each in (learner, eager)]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-10)


def on_cuda(make):
    return lambda *args, **settings: make(*args, **settings | {"device_type": "cuda"})


def overwriting(graph, *inputs):
    """Return a graph's results in memory that is the same at every call, as what it changes is."""
    tensors = [t for t in tree_leaves(inputs) if t is not None]
    versions = [t._version for t in tensors]
    with torch.no_grad():
        results, spec = tree_flatten(graph._run(*inputs))
        if not hasattr(graph, "memory"):
            graph.memory = [torch.empty_like(t) for t in results]
            graph.changed = []
        for place, result in zip(graph.memory, results, strict=True):
            place.copy_(result)
    graph.changed.append(
        {t.data_ptr() for t, before in zip(tensors, versions, strict=True) if t._version > before}
    )
    assert graph.changed[0] == graph.changed[-1]
    return tree_unflatten(graph.memory, spec)


class TestGenerators:
    """Draws on the GPU have generators of their own, one for each."""

    @pytest.fixture
    def states(self, monkeypatch):
        found = [torch.tensor([1]), torch.tensor([2])]

        def set_all(states):
            found[:] = states

        def seed_all(seed):
            found[:] = [torch.tensor([seed % 2**62])] * 2

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(found))
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_all)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
        return found

    def test_are_seeded_and_put_back(self, states):
        before = capture()
        set_generators(7)
        assert states == [torch.tensor([7])] * 2
        assert random.random() == random.Random(7).random()
        restore(before)
        assert states == [torch.tensor([1]), torch.tensor([2])]

    def test_of_fewer_devices_than_a_checkpoint_has(self, states):
        before = capture()
        del states[1]
        restore(before)
        assert states == [torch.tensor([1])]

    def test_a_draw_leaves_them_alone(self, states):
        Koi(mlp(), num_iterations=2, seed=0).train(Fits())
        assert states == [torch.tensor([1]), torch.tensor([2])]
        draw(Fits(), 1, Place(0, "meta-iteration", 0))
        assert states[0] == states[1] != torch.tensor([1])


class TestLossScale:
    """float16, whose gradients vanish or overflow unless the loss is scaled."""

    @pytest.mark.usefixtures("float64")
    def test_a_training_with_it_is_one_without(self, monkeypatch):
        """A power of two changes no digit of float64."""
        plain = trained("eager", start := mlp(), Fits())
        monkeypatch.setattr("koi.inner.base.InnerLoop.precision", lambda *_: no_autocast())
        scaled = trained("eager", start, Fits(), autocast=torch.float16)
        assert_agree(plain, scaled, tolerance=0)

    @pytest.mark.parametrize("how", [{"compile": True}, {"vectorize": True}])
    def test_runs_one_by_one_and_uncompiled(self, how):
        koi = Koi(mlp(), autocast=torch.float16, num_iterations=1, **how)
        with pytest.raises(EngineError, match=r"use autocast=torch\.bfloat16"):
            koi.train(Fits())


def no_autocast():
    return torch.autocast("cpu", enabled=False)
