"""MAML through many inner steps: step by step, in the memory of one, as through one graph."""

import os
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from engine_toys import ENGINES, NETS, Fit, Fits, assert_agree, trained
from koi import Koi, linear
from toys import Regressions, small_net, snapshot

pytestmark = pytest.mark.usefixtures("float64", "one_thread", "untraced")

SETTINGS = {
    "step_size": 0.05,
    "num_steps": 4,
    "num_iterations": 3,
    "meta_step_size": 0.3,
    "meta_batch_size": 3,
    "algorithm": "maml",
    "seed": 1,
}
INNER = {
    "sgd": {},
    "momentum": {"inner_optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)},
    "adam, carried": {"inner_optimizer": lambda p, lr: torch.optim.Adam(p, lr, eps=0.1)},
    "adamw, reset": {
        "inner_optimizer": lambda p, lr: torch.optim.AdamW(p, lr, eps=0.1, weight_decay=0.1),
        "inner_state": "reset",
    },
    "clipped, falling": {"clip_inner": 0.3, "inner_schedule": linear(1.0, 0.2)},
    "head alone": {"adapts": lambda name, p: name.startswith(("2.", "4.", "head"))},
    "crosswise": {"adapts": "*.weight", "learns": lambda name, p: p.dim() == 1},
    "skipping": {"on_nonfinite": "skip"},
    "in chunks": {"chunk_size": 2},
    "learned rates": {"learn_step_size": "layer", "chunk_size": 1},
}

LATER = ("momentum", "adamw, reset", "head alone", "skipping")


def both_ways(monkeypatch, engine, net, tasks, **settings):
    """Train in one graph and step by step; return the learners."""
    learners = []
    for most in (10**9, 0):
        monkeypatch.setattr("koi.inner.second_order.MOST_IN_ONE_GRAPH", most)
        learners.append(trained(engine, net, tasks, **SETTINGS | settings))
    return learners


@pytest.mark.parametrize(
    ("inner", "engine"),
    [
        # whatever is inside, the compiled engines go back by the same lines
        pytest.param(inner, engine, marks=[pytest.mark.slow] * (inner in LATER and "com" in engine))
        for inner in INNER
        for engine in ENGINES
    ],
)
def test_both_ways_agree(inner, engine, monkeypatch):
    """To 1e-12, running statistics and moments included."""
    make, shape = NETS["conv"]
    torch.manual_seed(0)
    one, other = both_ways(monkeypatch, engine, make(), Fits(shape), **INNER[inner])
    assert_agree(one, other, 1e-12)


@pytest.mark.parametrize("engine", ["eager", "vectorized"])
def test_in_lower_precision(engine, monkeypatch):
    """In bfloat16, whose rounding is 1/256, both ways compute the same by other sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    one, other = both_ways(monkeypatch, engine, net, Fits(), autocast=torch.bfloat16)
    before, one, other = map(snapshot, (net, one.model, other.model))
    moved = max((one[name] - before[name]).abs().max() for name in before)
    apart = max((one[name] - other[name]).abs().max() for name in before)
    assert apart <= moved / 64


def test_resumed_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr("koi.inner.second_order.MOST_IN_ONE_GRAPH", 0)
    torch.manual_seed(0)
    net = NETS["conv"][0]()
    tasks, whole = Fits(NETS["conv"][1]), Koi(deepcopy(net), **SETTINGS)
    whole.train(tasks)
    stop = lambda koi, record: Koi.STOP  # noqa: E731
    Koi(deepcopy(net), **SETTINGS).train(tasks, callbacks=[stop], checkpoint_dir=tmp_path)
    resumed = Koi(deepcopy(net), **SETTINGS)
    resumed.train(tasks, checkpoint_dir=tmp_path, resume=True)
    torch.testing.assert_close(snapshot(resumed.model), snapshot(whole.model), rtol=0, atol=0)


def test_the_log_says_which_way(monkeypatch, caplog):
    with caplog.at_level("INFO", "koi"):
        both_ways(monkeypatch, "eager", NETS["mlp"][0](), Fits(), num_iterations=2)
    said = [message for message in caplog.messages if "step by step" in message]
    assert said == ["MAML goes back through 4 inner steps step by step, in the memory of one"]


class Dropped(nn.Sequential):
    """Draws at random in every inner step."""

    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("engine", ["eager", "vectorized"])
@pytest.mark.parametrize("seed", [1, None])
def test_draws_are_repeated(engine, seed, monkeypatch):
    """The random numbers of a step that is computed once more, and those after all of it."""
    torch.manual_seed(0)
    net = Dropped()
    learners = []
    for most in (10**9, 0):
        monkeypatch.setattr("koi.inner.second_order.MOST_IN_ONE_GRAPH", most)
        torch.manual_seed(5)
        learners.append(trained(engine, net, Fits(), **SETTINGS | {"seed": seed}))
    assert_agree(*learners, 1e-12)


class Counting(nn.Linear):
    """Keeps in an attribute how often it was called, and computes with it."""

    def __init__(self):
        super().__init__(3, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def test_what_a_module_keeps_besides(monkeypatch):
    """Such steps cannot be computed once more: one graph, as before."""
    torch.manual_seed(0)
    one, other = both_ways(monkeypatch, "eager", Counting(), Regressions(), num_iterations=2)
    assert_agree(one, other, 0)


def test_by_central_differences():
    """The gradient itself, of 30 steps: 30 · 4 tensors are above the rule's bound."""
    torch.manual_seed(0)
    model, task = small_net(), Fits(kind=Fit).sample()
    one = {"num_iterations": 1, "meta_batch_size": 1, "meta_step_size": 1.0}
    koi = trained("eager", model, Always(task), **SETTINGS | one | {"num_steps": 30})
    h, start = 1e-5, snapshot(model)

    def loss_at(value):
        moved = deepcopy(model)
        with torch.no_grad():
            moved[0].weight[0, 0] = value
        optimizer = torch.optim.SGD(moved.parameters(), 0.05)
        for _ in range(30):
            optimizer.zero_grad()
            task.loss(moved).backward()
            optimizer.step()
        return task.loss(moved).item()

    at = start["0.weight"][0, 0].item()
    slope = (loss_at(at + h) - loss_at(at - h)) / (2 * h)
    found = at - koi.model[0].weight[0, 0].item()
    assert found == pytest.approx(slope, rel=1e-6)


class Always:
    def __init__(self, task):
        self.task = task

    def sample(self):
        return self.task


def test_memory_is_that_of_one_step():
    """From 20 to 200 steps of 1,024 examples memory grows by the kept φ's, not by the graphs."""
    script = """
        import resource, torch
        from torch import nn
        from koi import Koi

        class Task:
            x, y = torch.randn(1024, 8), torch.randn(1024, 8)
            def loss(self, model):
                return (model(self.x) - self.y).square().mean()
            def sample(self):
                return self

        net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 8))
        peaks = []
        for num_steps in (20, 20, 200):
            koi = Koi(net, 1e-3, num_steps, 1, algorithm="maml", meta_step_size=0.0, check=False)
            koi.train(Task())
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(*peaks)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    _, short, long = map(float, done.stdout.split())
    # a graph of one step is some 2.5 MB; 180 more φ's of 21 kB are 4
    assert long < short + 100
