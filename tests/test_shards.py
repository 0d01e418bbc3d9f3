"""The shards of the slow tests are all of them, each test in one."""

import itertools
from types import SimpleNamespace

import conftest


def shard(number, tests):
    """Return the tests that pytest is left with."""
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    config = SimpleNamespace(getoption=lambda name: number, hook=hook)
    kept = list(tests)
    conftest.pytest_collection_modifyitems(config, kept)
    return kept


def test_as_many_commits_as_there_are_shards_run_every_test_once():
    tests = [object() for _ in range(3 * conftest.NUM_SHARDS + 2)]
    first = 160  # the number of some commit
    shards = [shard(first + n, tests) for n in range(conftest.NUM_SHARDS)]
    assert sorted(map(id, itertools.chain(*shards))) == sorted(map(id, tests))
    assert {len(some) for some in shards} == {3, 4}
    assert shard(None, tests) == tests
