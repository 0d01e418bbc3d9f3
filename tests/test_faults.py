"""A short round of the faults: see faults.py, and `make faults` for a full one."""

import pytest

from faults import FAULTS

SHORT = [fault for fault in FAULTS if fault.short]


@pytest.mark.parametrize("fault", SHORT, ids=[fault.name for fault in SHORT])
def test_nothing_is_lost(fault):
    assert fault.happens(fault.short) == 0
