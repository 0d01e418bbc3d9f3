"""Combinations that nobody thought of, drawn from the parts of the table of cases."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import EVERY, MODELS, OPTIMIZERS, SETTINGS, TASKS, Case
from test_cases import check

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread", "untraced"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:num_steps = 1"),
]


def small(names):
    """Return a strategy of rows that need nothing but torch."""
    return st.sampled_from([name for name in names if not getattr(names[name], "slow", False)])


CASES = st.builds(
    Case,
    model=small(MODELS),
    task=small(TASKS),
    optimizer=small(OPTIMIZERS),
    settings=small(SETTINGS),
    algorithm=st.sampled_from(["reptile", "fomaml"]),
)


# The same examples each time, so that a commit is to blame for what fails.
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CASES, engine=st.sampled_from(EVERY))
def test_any_combination(case, engine):
    check(case, engine)
