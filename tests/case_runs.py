"""How a case of the table is run: by the naive twin, and in an engine."""

import functools
from typing import Any

import torch
from torch import nn

import naive
from cases import Case
from engine_toys import ENGINES
from koi import Koi


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers, those that are not saved among them."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@functools.lru_cache(maxsize=8)
def twin(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what `naive` makes of the case: the trained model, and the curves of two tasks."""
    model, given = case.start(), case.arguments()
    given.pop("chunk_size", None)
    by_name = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    given["inner_optimizer"] = by_name.get(given["inner_optimizer"], given["inner_optimizer"])
    state = naive.meta_train(model, case.stream(0), **given)
    inner = {name: given[name] for name in ("step_size", "inner_optimizer")}
    curves = naive.evaluate(model, case.stream(1), 2, given["num_steps"], state=state, **inner)
    return tensors(model), curves


def learner(case: Case, vectorize: bool | str, compile: bool) -> Koi:
    """Return a learner of the case, not trained yet."""
    return Koi(case.start(), vectorize=vectorize, compile=compile, seed=1, **case.arguments())


def result(koi: Koi, case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Train and evaluate the learner; return what `twin` returns."""
    koi.train(case.stream(0))
    return tensors(koi.model), koi.evaluate(case.stream(1), num_tasks=2).losses


# What the eager engine has made of the latest cases.
_eager: dict[Case, Any] = {}


def eager(case: Case) -> Any:
    """Return what the eager engine makes of the case."""
    if case not in _eager:
        remember(case, result(learner(case, *ENGINES["eager"]), case))
    return _eager[case]


def remember(case: Case, found: Any) -> None:
    """Keep what the eager engine has made of a case for the others, which are held to it."""
    if len(_eager) > 8:
        _eager.clear()
    _eager[case] = found


def assert_right(found: Any, case: Case, engine: str) -> None:
    """Assert that an engine gives what the twin gives: to 1e-10, or as differences allow."""
    if case.algorithm != "maml":
        return assert_close(found, twin(case), 1e-10)
    if case.differences:
        assert_close(found, twin(case), 1e-6)
    if engine == "eager":
        remember(case, found)
    elif not case.refusals("eager"):
        assert_close(found, eager(case), 1e-10)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def moved(found: Any, case: Case) -> bool:
    """Return whether training has changed any parameter."""
    start = case.start()
    return any(not torch.equal(found[0][name], p) for name, p in start.named_parameters())


def unchanged(koi: Koi, case: Case) -> bool:
    """Return whether φ is what it was before the training, bit for bit."""
    mine, before = tensors(koi.model), tensors(case.start())
    return all(torch.equal(mine[name], value) for name, value in before.items())
