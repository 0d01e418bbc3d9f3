"""What adapts and what learns: equal to the naive twin in every engine, or refused by name."""

import functools
import os
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import naive
from engine_toys import ENGINES, OPTIMIZERS, Fits, assert_agree, conv, mlp, trained
from koi import ConfigurationError, Koi
from koi.phi.roles import chosen
from test_own_loop import Stop
from toys import assert_same, snapshot

EVERY = ("reptile", "fomaml", "maml", "eigen-reptile")
ROLES = {
    "ANIL": ({"adapts": "2.*"}, ("fomaml", "maml")),
    "BOIL": ({"adapts": ["0.*"]}, ("fomaml", "maml")),
    "head alone": ({"adapts": "2.*", "learns": "2.*"}, EVERY),
    "personal head": ({"learns": "0.*"}, EVERY),
    "apart": ({"adapts": "2.*", "learns": "0.*"}, ("fomaml", "maml")),
    "crosswise": ({"adapts": "*.weight", "learns": ["*.bias", "2.weight"]}, ("fomaml", "maml")),
}
CASES = [(role, algorithm) for role, (_, all_of) in ROLES.items() for algorithm in all_of]
SETTINGS = {
    "step_size": 0.1,
    "num_steps": 3,
    "num_iterations": 2,
    "meta_step_size": 0.3,
    "meta_batch_size": 2,
    "seed": 1,
}

pytestmark = pytest.mark.usefixtures("float64", "one_thread", "untraced")


def named(model, roles):
    return {role: chosen(model, as_tuple(given), role) for role, given in roles.items()}


def as_tuple(given):
    return (given,) if isinstance(given, str) else tuple(given)


class Drawn:
    """The tasks that a learner with seed 1 draws, one after the other."""

    def __init__(self, tasks):
        self.tasks = []
        koi = Koi(nn.Linear(3, 2), vectorize=False, **SETTINGS | {"meta_step_size": 0.0})
        original = tasks.sample
        tasks.sample = lambda: self.tasks.append(original()) or self.tasks[-1]
        koi.train(tasks)
        tasks.sample = original
        self.tasks = iter(self.tasks[-4:])

    def sample(self):
        return next(self.tasks)


@functools.cache
def twin_of(role, algorithm):
    """Return what the naive twin comes to, once for all engines."""
    torch.manual_seed(0)
    twin = mlp()
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    settings |= named(twin, ROLES[role][0])
    naive.meta_train(twin, Drawn(Fits()), **settings, algorithm=algorithm)
    return snapshot(twin)


@pytest.mark.parametrize("engine", [*ENGINES, "step by step"])
@pytest.mark.parametrize(("role", "algorithm"), CASES)
def test_same_as_the_naive_twin(role, algorithm, engine, monkeypatch):
    if engine == "step by step":
        monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", 0)
        engine = "vectorized+compiled"
    torch.manual_seed(0)
    model, roles = mlp(), ROLES[role][0]
    koi = trained(engine, model, Fits(), **SETTINGS | roles, algorithm=algorithm)
    tolerance = 1e-6 if algorithm == "maml" else 1e-10
    expected = twin_of(role, algorithm)
    torch.testing.assert_close(snapshot(koi.model), expected, rtol=0, atol=tolerance)
    learned = koi.settings.learned(model)
    for name, value in model.named_parameters():
        same = torch.equal(dict(koi.model.named_parameters())[name], value)
        assert same == (name not in learned.those_learned(learned.params)), name


def of_a_convolution(engine, role, optimizer, algorithm):
    """Return a learner that was trained, and its curves of five tasks."""
    torch.manual_seed(0)
    roles = {name: "4.*" if "2" in given else "0.*" for name, given in ROLES[role][0].items()}
    settings = {**roles, **OPTIMIZERS[optimizer], "algorithm": algorithm, "num_iterations": 3}
    koi = trained(engine, conv(), Fits((1, 4, 4)), **settings)
    return koi, koi.evaluate(Fits((1, 4, 4)), 5).losses


one_by_one = functools.cache(functools.partial(of_a_convolution, "eager"))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("role", ["ANIL", "personal head", "apart"])
def test_engines_agree(role, optimizer, engine):
    """With running statistics, moments that are carried, and MAML where it can be."""
    for algorithm in ("fomaml", "maml"):
        expected, curves = one_by_one(role, optimizer, algorithm)
        koi, found = of_a_convolution(engine, role, optimizer, algorithm)
        assert_agree(expected, koi, 1e-9)
        torch.testing.assert_close(found, curves, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_optimizer(engine):
    """Optimizers that step as themselves, given the adapted parameters alone."""
    if "compiled" in engine:
        return
    seen = []

    def rmsprop(params, lr):
        seen.append(len(params))
        return torch.optim.RMSprop(params, lr)

    koi = trained(engine, mlp(), Fits(), algorithm="fomaml", adapts="2.*", inner_optimizer=rmsprop)
    assert set(seen) == {2}
    eager = trained(
        "eager",
        deepcopy(koi.model),
        Fits(),
        algorithm="fomaml",
        inner_optimizer=rmsprop,
        adapts="2.*",
    )
    assert eager.iteration == koi.iteration


@pytest.mark.parametrize("engine", ENGINES)
def test_roles_that_change(engine):
    """What a callback sets takes effect at the next meta-iteration, in every engine."""

    def narrow(koi, record):
        if koi.iteration == 2:
            koi.adapts, koi.learns = "2.*", "2.*"

    torch.manual_seed(0)
    model = mlp()
    vectorize, compile = ENGINES[engine]
    settings = SETTINGS | {"num_iterations": 4, "algorithm": "fomaml"}
    koi = Koi(deepcopy(model), vectorize=vectorize, compile=compile, **settings)
    koi.train(Fits(), callbacks=[narrow, Stop(2)])
    middle = snapshot(koi.model)
    koi.train(Fits())
    for name, value in snapshot(koi.model).items():
        assert torch.equal(value, middle[name]) == name.startswith("0."), name


def test_resume_and_checkpoints(tmp_path):
    roles = {"adapts": "2.*", "learns": ["*.bias", "2.weight"], "algorithm": "maml"}

    def learner(**changed):
        torch.manual_seed(0)
        return Koi(mlp(), **SETTINGS | {"num_iterations": 5} | roles | changed, average=0.9)

    alone = learner()
    alone.train(Fits(), validate=Fits(), validate_every=2)
    for callbacks in ([Stop(3)], []):
        koi = learner()
        options = {"validate": Fits(), "validate_every": 2, "checkpoint_dir": tmp_path}
        koi.train(Fits(), None, callbacks, **options, resume=True)
    assert_same(koi.model, alone.model)
    assert_same(koi.averaged().model, alone.averaged().model)
    again = Koi.load(tmp_path / "iteration-000000005.safetensors", deepcopy(koi.model))
    assert again.adapts == ("2.*",)
    assert again.learns == ("*.bias", "2.weight")
    other = learner(adapts=None)
    with pytest.raises(Exception, match="adapts: "):
        other.load_state_dict(alone.state_dict())


def test_what_nothing_moves_is_known_by_its_digest():
    """As frozen parameters are: a checkpoint holds none of it, and finds out another."""
    roles = {"adapts": "2.*", "learns": "2.*"}
    koi = Koi(mlp(), **SETTINGS, **roles)
    state = koi.state_dict()
    assert set(state["params"]) == {"2.weight", "2.bias"}
    assert set(state["frozen"]) == {"0.weight", "0.bias"}
    with pytest.raises(Exception, match=r"frozen parameters 0\.weight, 0\.bias had other values"):
        Koi(mlp(), **SETTINGS, **roles).load_state_dict(state)


def test_adapted_module_shares_what_nothing_moves():
    koi = Koi(mlp(), **SETTINGS, adapts="2.*", learns="2.*")
    task = Fits().sample()
    assert koi.adapt(task)[0].weight is koi.model[0].weight
    anil = Koi(mlp(), **SETTINGS, adapts="2.*", algorithm="maml")
    module = anil.adapt(task)
    before = module[0].weight.clone()
    assert module[0].weight is not anil.model[0].weight
    anil.train(Fits())
    assert torch.equal(module[0].weight, before)


def test_tied_parameters_are_chosen_by_any_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert chosen(model, ("1.weight",), "adapts") == ("0.weight",)
    assert chosen(model, lambda name, p: p.dim() == 2, "adapts") == ("0.weight",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapts": "head.*"}, r"adapts = 'head.\*': no parameter has such a name"),
        ({"adapts": "2.weigth"}, r'no parameter has such a name; did you mean "2.weight"\?'),
        ({"learns": ["0.*", "3.*"]}, r"learns = '3.\*': no parameter"),
        ({"adapts": lambda name, p: False}, r"adapts chooses no parameter"),
        ({"adapts": []}, r"adapts = \[\]: must be a name pattern"),
        ({"adapts": [0]}, r"adapts = \[0\]"),
        ({"adapts": "2.*"}, r"algorithm='reptile' learns from where the inner loop ends"),
        ({"adapts": "2.*", "algorithm": "eigen-reptile"}, r"adapts= leaves 0.weight, 0.bias"),
        ({"adapts": "1.*"}, r"adapts = '1.\*'"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        Koi(mlp(), **settings)


def test_frozen_ones_cannot_be_chosen():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"0\.weight, 0\.bias cannot learn, as its"):
        Koi(model, adapts="0.*")
    Koi(model, adapts="*", learns="*")  # the others


def test_a_large_frozen_part_is_held_once():
    """100 million frozen parameters, 400 MB: what Koi adds to that is far less than one copy.

    A small one goes first, for what is imported: 224 MB where torch is built for GPUs.
    """
    script = f"""
        import pathlib, re, resource, torch
        from torch import nn
        from engine_toys import Fits
        from koi import Koi
        torch.compile = lambda function, **options: function

        class Net(nn.Module):
            def __init__(self, rows):
                super().__init__()
                self.base = nn.Embedding.from_pretrained(torch.ones(rows, 100))
                self.head = nn.Linear(3, 2)

            def forward(self, x):
                return self.head(x) + self.base.weight[:2, 0]

        def use(net, vectorize, compile):
            koi = Koi(net, 0.1, 2, 2, meta_batch_size=3, seed=0, average=0.9,
                      vectorize=vectorize, compile=compile)
            koi.train(Fits(), validate=Fits(), validate_every=1)
            module = koi.adapt(Fits().sample())
            koi.averaged().evaluate(Fits(), 5)
            koi.measure(Fits(), lambda model, task: torch.zeros(()), 5)
            koi.state_dict()

        def peak():  # on Linux ru_maxrss has the peak of the process that started this one, too
            status = pathlib.Path("/proc/self/status")
            if status.exists():
                return int(re.search("VmHWM:(.*) kB", status.read_text())[1])
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        for engine in {[*ENGINES.values()]}:
            use(Net(2), *engine)
        print(peak())
        net = Net(10**6)
        print(peak())
        for engine in {[*ENGINES.values()]}:
            use(net, *engine)
            print(peak())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    imported, held, *after = map(int, done.stdout.split())
    assert len(after) == len(ENGINES)
    once = held - imported  # in bytes on macOS, elsewhere in KiB
    assert once > 0
    assert max(after) - held < once / 4
