"""With a seed, draws are a function of place and the user's generators stay as they are."""

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import naive
from koi import Koi
from toys import InTurn, Regressions, assert_close, assert_same, small_net, snapshot

SETTINGS = {
    "step_size": 0.01,
    "num_steps": 3,
    "num_iterations": 4,
    "meta_step_size": 0.1,
    "meta_batch_size": 2,
}


class Noisy:
    """Draws from all three global generators, when sampled and in every loss."""

    def __init__(self):
        self.drawn = []  # a number for each task, in the order of sampling

    def sample(self):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return NoisyTask(sum(self.drawn[-1]))


class NoisyTask:
    def __init__(self, level):
        self.level = level

    def loss(self, model):
        x = torch.randn(4, 3) + np.random.randn()
        return (model(x) - self.level + random.random()).square().mean()


def dropout_net():
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def states():
    """Return the states of the three generators, in a form that compares."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def reseed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", torch.optim.RMSprop])
def test_two_runs_are_equal_bit_for_bit(optimizer, algorithm):
    if algorithm == "maml" and callable(optimizer):
        optimizer = torch.optim.AdamW
    start = dropout_net()
    ends = []
    for global_seed in (1, 2):
        reseed(global_seed)
        model = deepcopy(start)
        koi = Koi(model, inner_optimizer=optimizer, algorithm=algorithm, seed=5, **SETTINGS)
        koi.train(Noisy())
        evaluation = koi.evaluate(Noisy(), num_tasks=3)
        ends.append((snapshot(model), snapshot(koi.adapt(NoisyTask(0.0))), evaluation.losses))
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_another_seed_is_another_run():
    start = dropout_net()
    ends = []
    for seed in (0, 1, 2**32, 2**64):
        model = deepcopy(start)
        Koi(model, seed=seed, **SETTINGS).train(Noisy())
        ends.append(tuple(model[0].weight.flatten().tolist()))
    assert len(set(ends)) == 4


@pytest.mark.parametrize("method", ["train", "adapt", "evaluate"])
def test_with_a_seed_the_global_states_stay(method):
    koi = Koi(dropout_net(), seed=0, **SETTINGS)
    before = states()
    if method == "adapt":
        koi.adapt(NoisyTask(0.0))
    else:
        getattr(koi, method)(Noisy())
    assert states() == before


@pytest.mark.parametrize("task_draws", [True, False])
def test_whatever_the_user_draws_in_between(task_draws):
    """NumPy's generator keeps every second normal number, with which its twister stands still."""
    tasks = Noisy() if task_draws else Regressions(1)
    koi = Koi(dropout_net(), seed=0, **SETTINGS | {"num_iterations": 9})
    one_later = states_after(np.random.standard_normal)
    between = [
        np.random.standard_normal,
        lambda: None,
        np.random.standard_normal,
        lambda: np.random.set_state(one_later),
        np.random.standard_normal,
        np.random.rand,
        lambda: np.random.seed(3),
        lambda: np.random.set_state(one_later),
        lambda: random.seed(1),
    ]
    for draw in between:
        draw()
        before = states()
        koi.step(tasks)
        assert states() == before


def states_after(draw):
    """Return the state of NumPy's generator after a draw."""
    draw()
    return np.random.get_state()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_without_a_seed_koi_draws_nothing_itself(algorithm):
    """A hand-written loop from the same global state ends at the same φ and the same state."""
    start = dropout_net()
    model, twin = deepcopy(start), deepcopy(start)
    settings = SETTINGS | {"algorithm": algorithm}
    reseed(3)
    Koi(model, **settings).train(Noisy())
    after_koi = states()
    reseed(3)
    naive.meta_train(twin, Noisy(), **settings)
    assert states() == after_koi
    assert_close(model, twin)


@pytest.mark.parametrize("make", [small_net, dropout_net])
def test_without_a_seed_tasks_alone_draw(make):
    """Making a learner, and all it does with tasks that draw nothing, leaves the states alone."""
    task = Regressions().sample()
    model = make().eval()
    before = states()
    koi = Koi(model, **SETTINGS)
    koi.train(InTurn(task))
    koi.evaluate(InTurn(task), num_tasks=2)
    koi.adapt(task)
    assert states() == before


def test_five_and_five_are_ten():
    """What came before does not matter: a new learner may start at the middle."""
    start = dropout_net()
    whole, parts = deepcopy(start), deepcopy(start)
    settings = SETTINGS | {"num_iterations": 10, "seed": 0}
    Koi(whole, **settings).train(Noisy())

    class PauseError(Exception):
        pass

    def pause(koi, record):
        if record.iteration == 4:
            raise PauseError

    koi = Koi(parts, **settings)
    with pytest.raises(PauseError):
        koi.train(Noisy(), callbacks=[pause])
    reseed(77)
    koi.train(Noisy())
    assert_same(parts, whole)


def test_a_task_depends_on_seed_iteration_and_number_alone():
    few, many, evaluated = Noisy(), Noisy(), Noisy()
    Koi(dropout_net(), seed=0, **SETTINGS).train(few)
    Koi(small_net(), seed=0, **SETTINGS | {"meta_batch_size": 3, "num_steps": 5}).train(many)
    assert [many.drawn[i] for i in (0, 1, 3, 4, 6, 7, 9, 10)] == few.drawn
    koi = Koi(small_net(), seed=0, **SETTINGS)
    koi.evaluate(evaluated, num_tasks=8)
    koi.evaluate(evaluated, num_tasks=8)
    assert evaluated.drawn[:8] == evaluated.drawn[8:]
    # and no two of them draw alike, nor does evaluation see the tasks of training
    everything = many.drawn + evaluated.drawn[:8]
    assert len(set(everything)) == len(everything)


def test_draws_in_a_loss_depend_on_place_alone():
    """One that draws more than usual does not change what the others see."""
    seen = {False: [], True: []}

    class Task(NoisyTask):
        greedy = False

        def loss(self, model):
            seen[Task.greedy].append(torch.rand(()).item())
            if Task.greedy:
                torch.rand(1000)
            return super().loss(model)

    for Task.greedy in (False, True):
        Koi(small_net(), seed=0, **SETTINGS | {"num_steps": 2}).train(InTurn(Task(0.0)))
    # the first draw of each task; the second comes after what the first loss drew
    assert seen[False][::2] == seen[True][::2]
    assert seen[False][1::2] != seen[True][1::2]
    assert len(set(seen[False])) == 2 * 2 * 4
