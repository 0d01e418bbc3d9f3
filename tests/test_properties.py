"""Combinations that nobody thought of, drawn from the parts of the table of cases."""

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from cases import EVERY, MODELS, OPTIMIZERS, SETTINGS, TASKS, Case
from test_cases import check

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread", "untraced"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:num_steps = 1"),
]


def rows(table):
    """Return a strategy of rows that go with all others and need nothing but torch."""
    fit = {n: not getattr(r, "slow", False) and getattr(r, "anywhere", True) for n, r in table}
    return st.sampled_from([name for name in fit if fit[name]])


CASES = st.builds(
    Case,
    model=rows(MODELS.items()),
    task=rows(TASKS.items()),
    optimizer=rows(OPTIMIZERS.items()),
    settings=rows(SETTINGS.items()),
    algorithm=st.sampled_from(["reptile", "fomaml"]),
)


# The same examples each time, so that a commit is to blame for what fails.
@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a case is as small as it gets
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CASES, engine=st.sampled_from(EVERY))
def test_any_combination(caplog, case, engine):
    assume(case.runs(engine))
    caplog.clear()
    check(case, engine, caplog)
