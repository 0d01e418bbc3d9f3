"""chunk_size bounds memory and changes nothing else; tasks that fail are named, or left out."""

import math
import re
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import koi
from engine_toys import (
    ALGORITHMS,
    ENGINES,
    FAST,
    NETS,
    Fit,
    Fits,
    assert_agree,
    conv,
    everything,
    mlp,
    trained,
)
from koi import Koi, NonFiniteError

pytestmark = pytest.mark.usefixtures("float64", "untraced")
TOGETHER = ["vectorized", "vectorized+compiled"]
TASKS = {net: partial(Fits, shape) for net, (_, shape) in NETS.items()}


@cache
def one_by_one(net, tasks, **settings):
    """Return a network and what the eager engine makes of it, once for all others."""
    model = NETS[net][0]()
    return model, trained("eager", model, tasks(), **settings)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 100])
@pytest.mark.parametrize("engine", TOGETHER)
def test_chunks(engine, chunk_size, algorithm, net):
    settings = {"meta_batch_size": 5, "algorithm": algorithm, "inner_optimizer": "adam"}
    settings["num_iterations"] = 2
    model, eager = one_by_one(net, TASKS[net], **settings)
    other = trained(engine, model, TASKS[net](), **settings, chunk_size=chunk_size)
    assert_agree(other, eager)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("engine", TOGETHER)
def test_evaluation_in_chunks(engine, chunk_size):
    model, tasks = conv(), Fits(NETS["conv"][1])
    eager = trained("eager", model, tasks)
    other = trained(engine, model, tasks, chunk_size=chunk_size)
    for num_tasks in (7, 3, 1, 10):
        curves = [learner.evaluate(tasks, num_tasks).losses for learner in (other, eager)]
        assert curves[0].shape == (num_tasks, 4)
        torch.testing.assert_close(*curves, rtol=0, atol=1e-10)


@koi.tensor_task
@dataclass
class Failing(Fit):
    """The loss of task ``bad`` is NaN at inner step 1, where the second minibatch is."""

    bad: torch.Tensor

    def loss(self, model):
        return torch.where(self.bad > 0, torch.nan, 1.0) * super().loss(model)

    @property
    def query(self):
        return Fit(self.x, self.y)

    def minibatches(self, num_steps):
        for step in range(num_steps):
            yield Failing(self.x, self.y, self.bad * (step == 1))


class Failures(Fits):
    """The tasks numbered so fail, counted through from the start."""

    def __init__(self, *bad):
        super().__init__()
        self.bad, self.count = bad, -1

    def sample(self):
        self.count += 1
        bad = torch.tensor(float(self.count in self.bad))
        return Failing(torch.randn(6, 3), torch.randn(6, 2), bad)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_error_names_task_and_step(engine, chunk_size):
    # five tasks a meta-iteration: number 13 is task 3 of meta-iteration 2
    start = mlp()
    settings = {"meta_batch_size": 5, "chunk_size": chunk_size}
    last = trained(engine, start, Fits(), **settings, num_iterations=2)
    assert last.history
    with pytest.raises(NonFiniteError) as caught:
        trained(engine, start, Failures(13), **settings)
    assert re.search(r"loss is nan at meta-iteration 2, task 3, inner step 1\b", str(caught.value))


# All of meta-iteration 0, none of 1, one of 2, two of 3.
SOME_FAIL = partial(Failures, 0, 1, 2, 3, 4, 13, 16, 19)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("engine", FAST)
def test_skipping(engine, chunk_size, algorithm):
    settings = {"meta_batch_size": 5, "algorithm": algorithm, "inner_optimizer": "adam"}
    settings["on_nonfinite"] = "skip"
    model, eager = one_by_one("mlp", SOME_FAIL, **settings)
    other = trained(engine, model, SOME_FAIL(), **settings, chunk_size=chunk_size)
    assert [record.num_skipped for record in other.history] == [5, 0, 1, 2]
    for learner in (eager, other):
        none = learner.history[0]
        assert math.isnan(none.loss_before)  # there was no task
        assert math.isnan(none.loss_after)
    phi, moments, _ = everything(other)
    assert all(t.isfinite().all() for t in [*phi.values(), *moments])
    assert_agree(other, eager)


@pytest.mark.filterwarnings("ignore:num_steps = 1")
@pytest.mark.parametrize("engine", ENGINES)
def test_result_that_is_infinite_while_the_losses_are_not(engine):
    """The last step leaps to infinity, and no loss is computed after it."""
    start, infinite = mlp(), {"step_size": lambda _: 1e308, "num_steps": 1}
    with pytest.raises(NonFiniteError, match=r"last step is not finite at meta-iteration 0, task"):
        trained(engine, start, Fits(kind=Fit), **infinite)
    skipped = trained(engine, start, Fits(kind=Fit), **infinite, on_nonfinite="skip")
    assert sum(record.num_skipped for record in skipped.history) == 12
    torch.testing.assert_close(dict(skipped.model.state_dict()), dict(start.state_dict()))


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation gave."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("work", ["train", "evaluate"])
@pytest.mark.parametrize("algorithm", ["reptile", "maml"])
def test_memory(algorithm, work):
    """A network of 320 weights, 6 examples: what is stacked grows with the chunk alone."""

    def size(num_tasks, chunk_size):
        model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
        settings = {"num_steps": 2, "num_iterations": 1, "algorithm": algorithm, "seed": 0}
        learner = Koi(model, vectorize=True, chunk_size=chunk_size, meta_batch_size=num_tasks,
                      **settings)  # fmt: skip
        with Largest() as mode:
            if work == "train":
                learner.train(Fits(kind=Fit))
            else:
                learner.evaluate(Fits(kind=Fit), num_tasks)
        return mode.size

    activations = 6 * 64
    assert size(24, 24) >= 24 * activations
    assert size(24, None) == size(24, 24)
    assert 4 * activations <= size(24, 4) <= 1.1 * size(4, 4)
    assert size(24, 4) < size(24, 12) < size(24, 24)
    assert size(48, 4) <= 1.1 * size(24, 4)
