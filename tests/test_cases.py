"""Every case of the table in every engine: what the naive twin gives, or a named refusal."""

import pytest

from case_runs import assert_right, learner, moved, result, unchanged
from cases import COMPILED, MODELS, Case, table
from engine_toys import ENGINES
from koi.errors import EngineError, KoiError
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
    ("scalar", "compiled"),
    ("weight changed in forward", "vectorized+compiled"),
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
        if case.runs(engine)
    ]


def check(case, engine, caplog, traced=False):
    """Hold a case in one engine to the table."""
    pytest.importorskip(MODELS[case.model].needs)
    words = case.refusals(engine, traced)
    try:
        koi = learner(case, *ENGINES[engine])
    except KoiError as error:
        return assert_says(str(error), words)
    try:
        found = result(koi, case)
    except KoiError as error:
        assert_says(str(error), words)
        assert koi.iteration > 0 or unchanged(koi, case)
        return
    if words:  # found out on the first tasks, which then run in a slower way
        assert koi.engine != engine, "this is not refused any more"
        assert_says(lines(caplog)[0], words)
    else:
        assert koi.engine == engine
        assert not lines(caplog)
    assert_right(found, case, engine)
    assert moved(found, case) == (case.settings != "no update")


def assert_says(text, words):
    assert any(some in text for some in words), text


def lines(caplog):
    """Return what Koi has logged, but for how long the compiler takes on a busy machine."""
    said = [record.getMessage() for record in caplog.records if record.name == "koi"]
    return [line for line in said if " so far: it happens once" not in line]


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(("case", "engine"), combinations(CASES, ENGINES))
def test_case(case, engine, caplog):
    check(case, engine, caplog)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(case, engine, id=f"{case}, {engine}")
        for case in REPTILE
        for engine in ("eager", "compiled")
        if case.refusals("vectorized") and not case.refusals(engine) and case.runs(engine)
    ],
)
def test_one_by_one_where_all_at_once_is_refused(case, engine, caplog, monkeypatch):
    """With vectorize="auto" the line in the log has the words, and the slower way is right."""
    monkeypatch.setattr("koi.inner.dispatch._FEW_TASKS", 1)
    koi = learner(case, "auto", ENGINES[engine][1])
    found = result(koi, case)
    assert koi.engine == engine
    if is_tensor_task(case.stream(0).sample()):
        line = lines(caplog)[0]
        assert_says(line, case.refusals("vectorized"))
        assert line.endswith("; running one task at a time")
    else:
        assert not lines(caplog)  # nothing was tried, nothing is amiss
    assert_right(found, case, engine)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("model", "engine"), TRACED)
def test_traced(model, engine, caplog):
    check(Case(model), engine, caplog, traced=True)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("case", REPTILE, ids=str)
def test_traced_in_full(case, engine, caplog):
    check(case, engine, caplog, traced=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", REPTILE, ids=str)
def test_compiled(case, caplog):
    """By Inductor, all tasks at once."""
    if case.model.startswith("complex") and not case.refusals("vectorized+compiled", traced=True):
        with pytest.raises(EngineError, match=r"complex operators.*: use compile=False"):
            result(learner(case, True, True), case)
        return
    check(case, "vectorized+compiled", caplog, traced=True)
