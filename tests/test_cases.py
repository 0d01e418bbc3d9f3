"""Every case of the table in every engine: what the naive twin gives, or a named refusal."""

import pytest

from cases import (
    COMPILED,
    MODELS,
    Case,
    assert_right,
    learner,
    moved,
    result,
    table,
    unchanged,
)
from engine_toys import ENGINES
from koi.errors import KoiError
from koi.tasks import is_tensor_task

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread"),
    # torch says of its own operations that vmap maps them slowly
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:num_steps = 1"),
]

CASES = table()
REPTILE = [case for case in CASES if case.algorithm == "reptile"]
# Traced in earnest each time; all others by `make test-slow`.
TRACED = [
    ("embedding", "vectorized+compiled"),
    ("average assigned", "compiled"),
    ("counter", "vectorized+compiled"),
    ("flag", "compiled"),
]


def combinations(cases, engines):
    """Return every case with these engines, each marked as slow if it is."""
    return [
        pytest.param(
            case,
            engine,
            id=f"{case}, {engine}",
            marks=[pytest.mark.slow] if case.slow(engine) else [],
        )
        for case in cases
        for engine in engines
    ]


def check(case, engine, traced=False):
    """Hold a case in one engine to the table."""
    pytest.importorskip(MODELS[case.model].needs)
    words = case.refusals(engine, traced)
    if words:
        return check_refusal(case, engine, words)
    koi = learner(case, *ENGINES[engine])
    found = result(koi, case)
    assert koi.engine == engine
    assert_right(found, case, engine)
    assert moved(found, case) == (case.settings != "no update")


def check_refusal(case, engine, words):
    try:
        koi = learner(case, *ENGINES[engine])
    except KoiError as error:
        return assert_says(error, words)
    with pytest.raises(KoiError) as caught:
        result(koi, case)
    assert_says(caught.value, words)
    assert koi.iteration > 0 or unchanged(koi, case)


def assert_says(error, words):
    assert any(some in str(error) for some in words), str(error)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(("case", "engine"), combinations(CASES, ENGINES))
def test_case(case, engine):
    check(case, engine)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(case, engine, id=f"{case}, {engine}")
        for case in REPTILE
        for engine in ("eager", "compiled")
        if case.refusals("vectorized") and not case.refusals(engine)
    ],
)
def test_one_by_one_where_all_at_once_is_refused(case, engine, caplog):
    """With vectorize="auto" the line in the log has the words, and the slower way is right."""
    koi = learner(case, "auto", ENGINES[engine][1])
    found = result(koi, case)
    assert koi.engine == engine
    lines = [record.getMessage() for record in caplog.records if record.name == "koi"]
    if is_tensor_task(case.stream(0).sample()):
        assert lines
        assert any(some in lines[0] for some in case.refusals("vectorized")), lines
        assert lines[0].endswith("; running one task at a time")
    else:
        assert not lines  # nothing was tried, nothing is amiss
    assert_right(found, case, engine)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("model", "engine"), TRACED)
def test_traced(model, engine):
    check(Case(model), engine, traced=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("case", REPTILE, ids=str)
def test_traced_in_full(case, engine):
    check(case, engine, traced=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", REPTILE, ids=str)
def test_compiled(case):
    """By Inductor, all tasks at once."""
    check(case, "vectorized+compiled", traced=True)
