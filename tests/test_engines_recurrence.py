"""Networks with LSTM, GRU, RNN and their cells train alike in every engine."""

import logging
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from engine_toys import ALGORITHMS, FAST, SETTINGS, Fit, Fits, assert_agree, moved, trained
from koi import EngineError, Koi
from koi.inner.layers.recurrence import LSTMKernel
from test_recurrence import LAYERS, Doubled


class Recurrent(nn.Module):
    """A recurrent layer over sequences of three, and a head at its last output and state."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = LAYERS[kind](2, 3, batch_first=True, **options)
        self.head = nn.LazyLinear(2)
        self(torch.randn(1, 3, 2))

    def forward(self, x):
        outputs, last = self.layer(x)
        return self.head(torch.cat([outputs[:, -1], tree_leaves(last)[-1][-1]], -1))


class Unrolled(nn.Module):
    """Cells that are called in turn, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(2, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        one = two = three = None
        for step in x.unbind(1):
            one = self.first(step, one)
            two = self.second(one[0], two)
            three = self.third(two, three)
        return self.head(three)


class Stacked(nn.Module):
    """An LSTM, a GRU and an RNN, one on the other, and a head."""

    def __init__(self):
        super().__init__()
        sizes = (nn.LSTM, 2), (nn.GRU, 3), (nn.RNN, 3)
        self.layers = nn.ModuleList(kind(size, 3, batch_first=True) for kind, size in sizes)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x[:, -1])


NETS = {kind: lambda kind=kind: Recurrent(kind) for kind in LAYERS}
NETS["deep lstm"] = lambda: Recurrent("lstm", num_layers=2, bidirectional=True)
NETS |= {"stacked": Stacked, "cells": Unrolled}
SEQUENCES = Fits((3, 2))


# The inner loops of the others are those of these two.
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("eigen-reptile", "fomaml")]


@cache
def one_by_one(name, algorithm):
    """Return a network and what the eager engine makes of it, once for all others."""
    net = NETS[name]()
    return net, trained("eager", net, SEQUENCES, algorithm=algorithm, num_iterations=2)


@pytest.mark.usefixtures("float64", "untraced")
@pytest.mark.parametrize("algorithm", ["reptile", "maml", *LATER])
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("name", NETS)
def test_in_training(name, engine, algorithm):
    net, eager = one_by_one(name, algorithm)
    other = trained(engine, net, SEQUENCES, algorithm=algorithm, num_iterations=2)
    assert_agree(other, eager)
    assert moved(other, net)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_lstms_kernel(algorithm, monkeypatch):
    """MAML, for which it is slow, does without."""
    calls, forward = [], LSTMKernel.forward
    monkeypatch.setattr(
        LSTMKernel, "forward", lambda *inputs: calls.append(inputs) or forward(*inputs)
    )
    net = Recurrent("lstm", num_layers=2, bidirectional=True)
    one_by_one, together = (
        trained(engine, net, SEQUENCES, algorithm=algorithm) for engine in ("eager", "vectorized")
    )
    assert_agree(together, one_by_one, tolerance=1e-5)
    assert bool(calls) == (algorithm != "maml")


@pytest.mark.usefixtures("float64", "traced")
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
def test_traced(engine):
    """The compiler takes them, though it refuses the classes of torch's layers."""
    net, sequences = Stacked(), Fits((2, 2))
    one_by_one, graph = (
        trained(which, net, sequences, num_iterations=1) for which in ("eager", engine)
    )
    assert_agree(graph, one_by_one)


@pytest.mark.usefixtures("untraced")
def test_inner_steps_are_not_written_out(caplog):
    """Each has all steps through time in it: a graph of several takes minutes to compile."""
    with caplog.at_level(logging.INFO, logger="koi"):
        trained("compiled", Recurrent("gru"), SEQUENCES)
    assert "compiling an inner step of one task" in caplog.text
    assert "compiling the inner loop" not in caplog.text


@pytest.mark.usefixtures("float64", "traced")
def test_subclass_is_refused_by_the_compiler():
    net = Recurrent("lstm")
    net.layer = Doubled(2, 3, batch_first=True)
    with pytest.raises(EngineError, match="cannot be compiled"):
        trained("compiled", net, SEQUENCES)


class Packed(Fit):
    """Sequences of two steps and of three."""

    def loss(self, model):
        lengths = [3, 3, 3, 2, 2, 2]
        packed = pack_padded_sequence(self.x, lengths, batch_first=True)
        return model.layer(packed)[0].data.square().mean()


@pytest.mark.usefixtures("float64", "untraced")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, about packing
class TestPackedSequences:
    """They run one by one."""

    TASKS = Fits((3, 2), Packed)

    def test_one_by_one_with_a_line_in_the_log(self, caplog):
        net = Recurrent("lstm")
        with caplog.at_level(logging.WARNING, logger="koi"):
            koi = Koi(deepcopy(net), **SETTINGS)
            koi.train(self.TASKS)
        assert koi.engine == "eager"
        (line,) = [record.getMessage() for record in caplog.records if record.name == "koi"]
        assert "packed sequence" in line
        assert "running one task at a time" in line
        assert_agree(koi, trained("eager", net, self.TASKS))

    @pytest.mark.parametrize("engine", FAST)
    def test_refused_where_nothing_else_is_left(self, engine):
        with pytest.raises(EngineError, match=r"nn.GRU was given a packed sequence.* pad"):
            trained(engine, Recurrent("gru"), self.TASKS)
