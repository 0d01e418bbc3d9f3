"""Inner rates that are learned: Meta-SGD's for each number, MAML++'s for each layer and step."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch

import naive
from engine_toys import ENGINES, Fits, mlp, trained
from koi import ConfigurationError, Koi, linear
from test_roles import SETTINGS, Drawn
from test_weights import Weights
from toys import InTurn, Point, Quadratic, snapshot

pytestmark = pytest.mark.usefixtures("float64", "one_thread", "untraced")

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1, eps=0.1),
}
ROWS = [
    ("parameter", "sgd", "maml", {}),
    ("parameter", "momentum", "fomaml", {"inner_schedule": linear(1.0, 0.5)}),
    ("parameter", "adamw", "maml", {"clip_inner": 0.5}),
    ("layer", "sgd", "fomaml", {"step_size": {"2.*": 0.2, "*": 0.1}}),
    ("layer", "momentum", "maml", {"inner_schedule": linear(1.0, 0.5)}),
    ("layer", "adamw", "fomaml", {"adapts": "2.*"}),
    ("layer", "sgd", "maml", {"adapts": "2.*"}),
]


@cache
def twin_of(row):
    """Return what the naive twin comes to, once for all engines."""
    more = ROWS[row][3]
    torch.manual_seed(0)
    twin = mlp()
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    settings |= settings_of(row)
    names = [name for name, _ in twin.named_parameters() if name.startswith("2.")]
    settings |= {"adapts": names} if "adapts" in more else {}
    rates = naive.meta_train(twin, Drawn(Fits()), **settings)
    return snapshot(twin), rates


def settings_of(row):
    kind, optimizer, algorithm, more = ROWS[row]
    return {
        "inner_optimizer": OPTIMIZERS[optimizer],
        "algorithm": algorithm,
        "learn_step_size": kind,
        "step_size": 0.1,
        "meta_step_size": 0.1,
        **more,
    }


@pytest.mark.parametrize("engine", [*ENGINES, "graph of a step", "eager step by step"])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_same_as_the_naive_twin(row, engine, monkeypatch):
    if engine in ("graph of a step", "eager step by step"):
        monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", 0)
        monkeypatch.setattr("koi.inner.second_order.MOST_IN_ONE_GRAPH", 0)
        engine = "eager" if engine == "eager step by step" else "vectorized+compiled"
    torch.manual_seed(0)
    model = mlp()
    koi = trained(engine, model, Fits(), **SETTINGS | settings_of(row))
    params, rates = twin_of(row)
    maml = koi.algorithm == "maml"
    tolerance = 1e-6 if maml else 1e-10
    torch.testing.assert_close(snapshot(koi.model), params, rtol=0, atol=tolerance)
    torch.testing.assert_close(koi.learned_step_sizes, rates, rtol=0, atol=tolerance)
    first = Koi(model, **SETTINGS | settings_of(row)).learned_step_sizes
    for name, rate in rates.items():
        assert bool((rate != first[name]).any()), "they have been learned"
    if maml and engine != "eager":
        eager = trained("eager", model, Fits(), **SETTINGS | settings_of(row))
        torch.testing.assert_close(snapshot(koi.model), snapshot(eager.model), rtol=0, atol=1e-10)
        own = koi.learned_step_sizes, eager.learned_step_sizes
        torch.testing.assert_close(*own, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["parameter", "layer"])
def test_a_task_s_weight_counts_for_the_rates_too(kind):
    torch.manual_seed(0)
    model = mlp()
    given = SETTINGS | {"algorithm": "fomaml", "learn_step_size": kind, "meta_step_size": 0.1}
    twin = deepcopy(model)
    plainly = {name: value for name, value in given.items() if name != "seed"}
    rates = naive.meta_train(twin, Drawn(Weights(1.0, 3.0)), **plainly)
    for engine in ENGINES:
        koi = trained(engine, model, Weights(1.0, 3.0), **given)
        torch.testing.assert_close(snapshot(koi.model), snapshot(twin), rtol=0, atol=1e-10)
        torch.testing.assert_close(koi.learned_step_sizes, rates, rtol=0, atol=1e-10)


def test_hand_worked():
    """One step on L(w) = (w − c)² / 2 from w with α: w' = w − α (w − c).

    dL(w')/dw = (1 − α)² (w − c), and dL/dα = −(1 − α)(w − c)² is the same for both algorithms.
    """
    for algorithm, slope in (("maml", 0.75**2 * 8), ("fomaml", 0.75 * 8)):
        for kind in ("parameter", "layer"):
            model = Point(8.0)
            given = {"algorithm": algorithm, "learn_step_size": kind, "meta_step_size": 0.01}
            koi = Koi(model, 0.25, 1, 1, **given)
            koi.train(InTurn(Quadratic(0.0)))
            torch.testing.assert_close(model.weight.detach(), torch.tensor([8.0 - 0.01 * slope]))
            (rate,) = koi.learned_step_sizes.values()
            torch.testing.assert_close(rate, torch.tensor([0.25 + 0.01 * 0.75 * 64]))


def test_adaptation_has_the_learned_rates():
    """More steps than in training have the last one's rate; step_size= takes their place."""
    koi = Koi(Point(8.0), 0.5, 2, 1, algorithm="fomaml", learn_step_size="layer")
    koi.learned_step_sizes["weight"].copy_(torch.tensor([0.75, 0.5]))
    assert koi.adapt(Quadratic(0.0), 1).weight.item() == 2.0
    assert koi.adapt(Quadratic(0.0), 3).weight.item() == 0.5
    assert koi.adapt(Quadratic(0.0), 1, step_size=0.5).weight.item() == 4.0
    rows = koi.evaluate(InTurn(Quadratic(0.0)), num_tasks=1, num_steps=3).losses
    torch.testing.assert_close(rows, torch.tensor([[32.0, 2.0, 0.5, 0.125]]))


@pytest.mark.parametrize("kind", ["parameter", "layer"])
def test_they_are_a_part_of_what_is_kept(kind, tmp_path):
    """Stopped and resumed, averaged, and best: all of φ."""
    given = {
        **settings_of(0),
        **{"learn_step_size": kind, "average": 0.5, "num_iterations": 4, "seed": 3},
        "meta_optimizer": partial(torch.optim.Adam, lr=0.01),
    }
    whole, first = Koi(mlp(), **SETTINGS | given), Koi(mlp(), **SETTINGS | given)
    first.model.load_state_dict(whole.model.state_dict())
    tasks, path = Fits(), []
    rates = whole.learned_step_sizes
    note = lambda *_: path.append({name: rate.clone() for name, rate in rates.items()})  # noqa: E731
    whole.train(tasks, callbacks=[note])
    stop = lambda koi, record: Koi.STOP if koi.iteration == 2 else None  # noqa: E731
    first.train(tasks, callbacks=[stop], checkpoint_dir=tmp_path)
    code = {"inner_optimizer": given["inner_optimizer"], "meta_optimizer": given["meta_optimizer"]}
    (file,) = tmp_path.glob("*.safetensors")
    second = Koi.load(file, mlp(), **code)
    torch.testing.assert_close(second.learned_step_sizes, path[1], rtol=0, atol=0)
    second.train(tasks)
    torch.testing.assert_close(snapshot(second.model), snapshot(whole.model), rtol=0, atol=0)
    torch.testing.assert_close(second.learned_step_sizes, path[3], rtol=0, atol=0)

    mean = whole.averaged().learned_step_sizes
    weights = torch.tensor([0.125, 0.25, 0.5, 1.0])
    for name, rate in mean.items():
        expected = torch.stack([step[name] for step in path])
        expected = torch.tensordot(weights, expected, 1) / weights.sum()
        torch.testing.assert_close(rate, expected)
    values = iter([1.0, 0.0, 2.0, 3.0])
    best = Koi(mlp(), **SETTINGS | given)
    best.model.load_state_dict(whole.model.state_dict())
    noted = []
    rates = best.learned_step_sizes
    note = lambda *_: noted.append({name: rate.clone() for name, rate in rates.items()})  # noqa: E731
    best.train(tasks, validate=lambda koi: next(values), validate_every=1, callbacks=[note])
    torch.testing.assert_close(best.learned_step_sizes, noted[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"algorithm": "reptile"}, "no gradient of the query loss"),
        ({"step_size": linear(0.1, 0.0)}, "step_size is a schedule, and with learn_step_size"),
        ({"step_size": {"*": linear(0.1, 0.0)}, "meta_step_size": 0.1}, "step_size is a schedule"),
        ({"step_size": {"nobody": 0.1}, "meta_step_size": 0.1}, "no parameter that adapts"),
        ({"inner_optimizer": torch.optim.RMSprop}, "works with torch.optim's SGD, Adam and AdamW"),
        ({"learn_step_size": "layers"}, "did you mean .layer"),
    ],
)
def test_refused(given, words):
    with pytest.raises(ConfigurationError, match=words):
        Koi(mlp(), **{"algorithm": "fomaml", "learn_step_size": "layer", **given})
