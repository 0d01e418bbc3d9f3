"""φ is never lost: whatever goes wrong, the model is at the last completed meta-iteration."""

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from koi import Koi, ModelError, NonFiniteError, TaskError, tensor_task
from toys import InTurn, Point, Quadratic, Regression, Regressions, assert_same, small_net, snapshot

SETTINGS = {
    "step_size": 0.05,
    "num_steps": 3,
    "num_iterations": 4,
    "meta_step_size": 0.4,
    "meta_batch_size": 2,
    "seed": 0,
    "check": False,  # which computes some losses more
}
# The loss calls are numbered through; this is the one in meta-iteration 2, task 1, inner step 2.
CALL = 2 * (2 * 3) + 1 * 3 + 2


class Faulty(Regressions):
    """Random tasks; the loss number ``CALL`` goes through ``fault`` first."""

    def __init__(self, fault):
        self.fault = fault
        self.calls = 0

    def sample(self):
        outer = self

        class Task(Regression):
            def loss(self, model):
                outer.calls += 1
                loss = super().loss(model)
                return outer.fault(loss) if outer.calls == CALL + 1 else loss

        return Task(torch.randn(6, 3), torch.randn(6, 2))


def raising(kind):
    def fault(loss):
        raise kind("mine")

    return fault


class MyError(Exception):
    pass


FAULTS = {
    "exception": (raising(MyError), MyError, "mine"),
    "interrupt": (raising(KeyboardInterrupt), KeyboardInterrupt, "mine"),
    "exit": (raising(SystemExit), SystemExit, "mine"),
    "vector": (lambda loss: loss.repeat(2), TaskError, r"shape \(2,\): it must be a scalar"),
    "one-element vector": (lambda loss: loss.reshape(1), TaskError, r"shape \(1,\)"),
    "float": (lambda loss: loss.item(), TaskError, r"of type float: .* without \.item\(\)"),
    "nothing": (lambda loss: None, TaskError, "of type NoneType"),
    "detached": (lambda loss: loss.detach(), TaskError, "does not depend on the model"),
    "complex": (lambda loss: loss + 1j, TaskError, r"is complex: it must be a real number"),
    "NaN": (lambda loss: loss * float("nan"), NonFiniteError, "the loss is nan"),
    "infinite": (lambda loss: loss * float("inf"), NonFiniteError, "the loss is inf"),
    "backward": (lambda loss: loss.backward() or loss, ModelError, r"without calling backward\(\)"),
}
NAMES_THE_STEP = [n for n in FAULTS if n not in {"exception", "interrupt", "exit", "backward"}]


def told(error, caplog):
    """Return all that the user is told: the message and its notes (logged by Python 3.10)."""
    return " ".join([str(error), *getattr(error, "__notes__", []), caplog.text])


@pytest.fixture(scope="module", name="clean")
def run_without_fault():
    """Return the model at first, and φ after each meta-iteration of a run without fault."""
    torch.manual_seed(0)
    model = small_net()
    start, trajectory = deepcopy(model), []
    koi = Koi(model, **SETTINGS)
    koi.train(Regressions(), callbacks=[lambda *_: trajectory.append(snapshot(model))])
    return start, trajectory


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_a_loss(name, clean, caplog):
    fault, kind, message = FAULTS[name]
    start, trajectory = clean
    model, states = deepcopy(start), torch.get_rng_state()
    koi, tasks = Koi(model, **SETTINGS), Faulty(fault)
    with pytest.raises(kind, match=message) as caught:
        koi.train(tasks)
    assert type(caught.value) is kind
    assert_same(model, trajectory[1])
    assert koi.iteration == len(koi.history) == 2
    assert torch.equal(states, torch.get_rng_state())
    text = told(caught.value, caplog)
    assert "meta-iteration 2" in text
    assert "task 1" in text
    assert ("inner step 2" in text) == (name in NAMES_THE_STEP)
    # and what is left leads where it would have led
    koi.train(tasks)
    assert_same(model, trajectory[3])
    assert [record.iteration for record in koi.history] == [0, 1, 2, 3]


def test_koi_says_where_in_its_own_message(clean):
    """Also where only the message is seen, as in most logs."""
    for name in NAMES_THE_STEP:
        fault, kind, _ = FAULTS[name]
        with pytest.raises(kind) as caught:
            Koi(deepcopy(clean[0]), **SETTINGS).train(Faulty(fault))
        for where in ("meta-iteration 2", "task 1", "inner step 2"):
            assert where in str(caught.value)


def normed():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": partial(torch.optim.SGD, momentum=0.9)},
        {"inner_optimizer": "adam"},
        {"inner_optimizer": torch.optim.RMSprop},
        {"meta_optimizer": torch.optim.Adam},
        {"meta_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        {"inner_optimizer": "adam", "algorithm": "fomaml"},
        {"inner_optimizer": "adam", "algorithm": "maml"},
        {"meta_step_size": lambda done: 1 - done, "meta_batch_size": 3},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_train_again_ends_where_one_run_ends(settings, inner_state):
    settings = SETTINGS | settings | {"inner_state": inner_state}
    start = normed()
    whole, parts = deepcopy(start), deepcopy(start)
    Koi(whole, **settings).train(Regressions())
    koi, tasks = Koi(parts, **settings), Faulty(raising(MyError))
    with pytest.raises(MyError):
        koi.train(tasks)
    assert 0 < koi.iteration < 4
    koi.train(tasks)
    assert_same(parts, whole)


def test_fault_in_sample(clean, caplog):
    class Tasks(Regressions):
        count = 0

        def sample(self):
            self.count += 1
            if self.count == 6:
                raise MyError
            return super().sample()

    model = deepcopy(clean[0])
    with pytest.raises(MyError) as caught:
        Koi(model, **SETTINGS).train(Tasks())
    assert "while sampling task 1 of meta-iteration 2" in told(caught.value, caplog)
    assert_same(model, clean[1][1])


class TestEnds:
    """A StopIteration would end a loop somewhere as if all was well; so it is an error by name."""

    @pytest.mark.parametrize("call", ["train", "evaluate", "measure"])
    @pytest.mark.parametrize("method", ["sample", "sample_batch"])
    def test_of_a_distribution(self, method, call):
        ends = iter([Regressions().sample()] * 3)

        class Stream:
            pass

        setattr(Stream, method, lambda self, *given: next(ends))
        koi = Koi(small_net(), **SETTINGS)
        more = [lambda model, task: torch.zeros(())] if call == "measure" else []
        if method == "sample_batch":
            list(ends)
        with pytest.raises(TaskError, match=r"the distribution has no more tasks \(") as caught:
            getattr(koi, call)(Stream(), *more)
        assert isinstance(caught.value.__cause__, StopIteration)
        whole = method == "sample" and call == "train"
        assert koi.iteration == (1 if whole else 0)
        assert ("task 1 of meta-iteration 1" in str(caught.value)) == whole

    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize("where", ["minibatches", "generator", "loss"])
    def test_inside_a_task(self, where, vectorize):
        """Of what is read by `next`; an iterator that `for` reads gives too few minibatches."""
        ends = iter(range(5))

        @tensor_task
        @dataclass
        class Task:
            x: torch.Tensor

            def loss(self, model):
                if where == "loss":
                    next(ends)
                return model(self.x).square().mean()

            def all_minibatches(self, num_steps):
                return [self for _ in range(num_steps) if next(ends) >= 0]

            def each_minibatch(self, num_steps):
                yield from self.all_minibatches(num_steps)

            if where != "loss":
                minibatches = all_minibatches if where == "minibatches" else each_minibatch

        class Tasks:
            def sample(self):
                return Task(torch.randn(4, 3))

        koi = Koi(small_net(), **SETTINGS, vectorize=vectorize)
        with pytest.raises(TaskError, match=r"raised StopIteration.*meta-iteration .*, task"):
            koi.train(Tasks())

    def test_other_errors_stay_what_they_are(self, caplog):
        few = [Regressions().sample()] * 2
        tasks = InTurn()
        tasks.sample = few.pop
        with pytest.raises(IndexError, match="pop from empty list") as caught:
            Koi(small_net(), **SETTINGS).train(tasks)
        assert "while sampling task 0 of meta-iteration 1" in told(caught.value, caplog)


@pytest.mark.parametrize("sampled", [None, 3, object(), torch.ones(2)])
def test_sample_gives_no_task(sampled):
    with pytest.raises(TaskError, match=r"sample of InTurn returned .* no method loss\(model\)"):
        Koi(small_net(), **SETTINGS).train(InTurn(sampled))


def test_fault_in_a_callback(clean):
    """The meta-iteration before it is complete, and is not done again."""
    model = deepcopy(clean[0])
    koi = Koi(model, **SETTINGS)

    def callback(koi, record):
        if record.iteration == 1:
            raise MyError

    with pytest.raises(MyError):
        koi.train(Regressions(), callbacks=[callback])
    assert_same(model, clean[1][1])
    koi.train(Regressions())
    assert_same(model, clean[1][3])


@pytest.mark.parametrize("error", [MyError(), KeyboardInterrupt()])
def test_fault_in_the_meta_optimizer(error):
    """It has moved the first parameter when it fails; that is taken back."""

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise error

    model = normed()
    before, kept = snapshot(model), torch.ones(4, 3)
    model[0].weight.grad = kept
    koi = Koi(model, meta_optimizer=Broken, **SETTINGS)
    with pytest.raises(type(error)):
        koi.train(Regressions())
    assert_same(model, before)
    assert koi.history == []
    assert model[0].weight.grad is kept


def test_moments_of_a_meta_optimizer_that_fails():
    """It has moved its own moments when it fails; that is taken back too."""

    class Broken(torch.optim.Adam):
        fails = False

        def step(self, closure=None):
            super().step()
            if self.fails:
                raise MyError

    whole, parts = (Koi(small_net(), meta_optimizer=Broken, **SETTINGS) for _ in range(2))
    parts.model.load_state_dict(whole.model.state_dict())
    whole.train(Regressions())

    def fail_next(koi, record):
        Broken.fails = record.iteration == 1

    with pytest.raises(MyError):
        parts.train(Regressions(), callbacks=[fail_next])
    Broken.fails = False
    parts.train(Regressions())
    assert_same(parts.model, whole.model)


def test_meta_update_that_is_not_finite():
    model = Point(1e5)
    koi = Koi(model, meta_optimizer=partial(torch.optim.SGD, lr=1e38), num_steps=2)
    with pytest.raises(NonFiniteError, match="meta-update"):
        koi.train(InTurn(Quadratic(0.0)))
    assert model.weight.item() == 1e5


def test_finite_losses_that_lead_to_no_number():
    class Root:
        def loss(self, model):
            return model.weight.abs().sqrt().sum()  # its slope at 0 is not finite

    model, task = Point(0.0), Quadratic(0.0)
    task.query = Root()
    with pytest.raises(NonFiniteError, match=r"what came of .* meta-iteration 0"):
        Koi(model, num_steps=1, algorithm="fomaml").train(InTurn(task))
    assert model.weight.item() == 0.0


NAN = Quadratic(float("nan"))
SKIPPING = {"step_size": 0.5, "num_steps": 2, "meta_step_size": 0.5, "on_nonfinite": "skip"}


class TestSkip:
    """on_nonfinite="skip": a task without a finite loss is left out and counted."""

    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
    def test_mean_over_the_others(self, algorithm, place):
        tasks = [Quadratic(0.0), Quadratic(4.0)]
        skipping, clean = Point(1.0), Point(1.0)
        shared = SKIPPING | {"algorithm": algorithm, "num_iterations": 1}
        Koi(clean, meta_batch_size=2, **shared).train(InTurn(*tasks))
        tasks.insert(place, NAN)
        koi = Koi(skipping, meta_batch_size=3, **shared)
        koi.train(InTurn(*tasks))
        assert_same(skipping, clean)
        assert skipping.weight.item() != 1.0
        assert [record.num_skipped for record in koi.history] == [1]

    @pytest.mark.parametrize("optimizer", ["sgd", "adam", torch.optim.RMSprop])
    def test_whole_meta_batch(self, optimizer):
        """φ and the carried moments stay; the next meta-iteration goes on as if nothing was."""
        skipping, clean = Point(1.0), Point(1.0)
        shared = SKIPPING | {"inner_optimizer": optimizer}
        koi = Koi(skipping, num_iterations=3, **shared)
        after_each = []
        koi.train(
            InTurn(Quadratic(0.0), NAN, Quadratic(4.0)),
            callbacks=[lambda koi, record: after_each.append(skipping.weight.item())],
        )
        Koi(clean, num_iterations=2, **shared).train(InTurn(Quadratic(0.0), Quadratic(4.0)))
        assert_same(skipping, clean)
        assert after_each[0] == after_each[1] != after_each[2]
        assert [record.num_skipped for record in koi.history] == [0, 1, 0]
        assert koi.history[1].update_norm == 0
        assert koi.history[1].loss_before != koi.history[1].loss_before  # NaN

    def test_other_faults_are_not_skipped(self):
        tasks = Faulty(lambda loss: loss.detach())
        with pytest.raises(TaskError):
            Koi(small_net(), on_nonfinite="skip", **SETTINGS).train(tasks)


class TestAdaptAndEvaluate:
    """They fail in the same words, and leave φ alone."""

    @pytest.mark.parametrize("name", NAMES_THE_STEP)
    def test_adapt(self, name):
        class Task(Regression):
            def loss(self, model):
                return FAULTS[name][0](super().loss(model))

        model = small_net()
        before = snapshot(model)
        with pytest.raises(FAULTS[name][1], match="step 0"):
            Koi(model, **SETTINGS).adapt(Task(torch.randn(6, 3), torch.randn(6, 2)))
        assert_same(model, before)

    @pytest.mark.parametrize("name", ["exception", "vector", "float", "nothing", "detached"])
    def test_evaluate(self, name, caplog):
        class Task(Regression):
            def loss(self, model):
                return FAULTS[name][0](super().loss(model))

        model, task = small_net(), Task(torch.randn(6, 3), torch.randn(6, 2))
        before, states = snapshot(model), torch.get_rng_state()
        with pytest.raises(FAULTS[name][1]) as caught:
            Koi(model, **SETTINGS).evaluate(InTurn(task))
        assert re.search(r"evaluation.* task 0", told(caught.value, caplog))
        assert_same(model, before)
        assert torch.equal(states, torch.get_rng_state())
