"""The engines are one algorithm: same seed, same tasks, same φ, moments, buffers and history."""

import functools
import itertools
import zlib

import pytest
import torch

from engine_toys import (
    ALGORITHMS,
    ENGINES,
    FAST,
    NETS,
    OPTIMIZERS,
    Fit,
    Fits,
    assert_agree,
    everything,
    moved,
    trained,
)

pytestmark = pytest.mark.usefixtures("float64")

CASES = list(itertools.product(ALGORITHMS, OPTIMIZERS, NETS))
# Inductor takes a minute for a larger network; `make test-slow` has every case. The last column
# is up to what size one graph is of all inner steps.
COMPLETE = [
    ("reptile", "sgd", "mlp", "vectorized+compiled", 64),
    pytest.param("maml", "momentum", "mlp", "compiled", 64, marks=pytest.mark.slow),
    pytest.param("reptile", "adam carry", "conv", "compiled", 0, marks=pytest.mark.slow),
]
# Others are traced in earnest, but not compiled.
TRACED = [
    ("fomaml", "adam carry", "mlp", "vectorized+compiled"),
    ("fomaml", "momentum", "conv", "vectorized+compiled"),
    ("maml", "adam reset", "conv", "compiled"),
    ("fomaml", "sgd", "encoder", "compiled"),
]


@functools.cache
def run(engine, algorithm, optimizer, net):
    """Return the start and a learner after three meta-iterations of two inner steps."""
    make, shape = NETS[net]
    torch.manual_seed(zlib.crc32(net.encode()))
    start = make()
    settings = {"num_steps": 2, "num_iterations": 3, "algorithm": algorithm}
    settings |= OPTIMIZERS[optimizer]
    if algorithm == "maml" and settings["inner_optimizer"] == "adam":
        # Adam's first step is g / (|g| + ε), whose slope at zero is 1 / ε: through that MAML makes
        # of rounding what it likes, unless ε is as large as gradients are.
        settings["inner_optimizer"] = functools.partial(torch.optim.Adam, eps=0.1)
    learner = trained(engine, start, Fits(shape), **settings)
    return start, learner


def agree(engine, *case):
    start, learner = run.__wrapped__(engine, *case)
    _, eager = run("eager", *case)
    assert moved(eager, start)
    assert_agree(learner, eager)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_vectorized(case):
    agree("vectorized", *case)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_what_is_compiled(case, engine):
    agree(engine, *case)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("algorithm", "optimizer", "net", "engine"), TRACED)
def test_traced(algorithm, optimizer, net, engine):
    agree(engine, algorithm, optimizer, net)


@pytest.mark.parametrize(("algorithm", "optimizer", "net", "engine", "written_out"), COMPLETE)
def test_compiled(algorithm, optimizer, net, engine, written_out, monkeypatch):
    monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", written_out)
    agree(engine, algorithm, optimizer, net)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["compiled", "vectorized+compiled"])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_compiled_in_full(case, engine):
    agree(engine, *case)


def test_the_cases_differ():
    """Were an argument ignored by every engine, all of the above would still pass."""
    states = [everything(run("eager", *case)[1])[0] for case in CASES]
    for (one, left), (other, right) in itertools.combinations(zip(CASES, states, strict=True), 2):
        if one[2] == other[2]:
            assert not all(torch.equal(left[name], right[name]) for name in left), (one, other)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_task_without_minibatches_and_query(algorithm, engine):
    start = NETS["mlp"][0]()
    eager, other = (
        trained(name, start, Fits(kind=Fit), algorithm=algorithm, inner_optimizer="adam")
        for name in ("eager", engine)
    )
    assert_agree(other, eager)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("engine", FAST)
def test_meta_optimizer(engine):
    start = NETS["mlp"][0]()
    outer = functools.partial(torch.optim.Adam, lr=0.01)
    eager, other = (
        trained(name, start, Fits(), meta_optimizer=outer) for name in ("eager", engine)
    )
    assert_agree(other, eager)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("untraced")
def test_two_runs_are_the_same_bit_for_bit(engine):
    start = NETS["conv"][0]()
    first, second = (trained(engine, start, Fits(NETS["conv"][1])) for _ in range(2))
    assert_agree(first, second, tolerance=0)
