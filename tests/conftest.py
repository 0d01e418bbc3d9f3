import gc
import os
import random
import resource
import signal

# As many processes run tests as there are cores: each of them, and what it starts, on one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from koi import ConfigurationError

# Nothing depends on a clock: a busy machine is no failure.
settings.register_profile("koi", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("koi")

# A shell's background jobs ignore Ctrl-C, which the tests that press it would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The slow tests in shares, of which the check of every commit runs the next one.
NUM_SHARDS = 3


def pytest_addoption(parser):
    parser.addoption(
        "--shard",
        type=int,
        metavar="N",
        help=f"run one of {NUM_SHARDS} shares of the selected tests: that of N modulo {NUM_SHARDS}",
    )


def pytest_configure(config):
    """Among the slow tests are so many graphs that it pays to compile torch's headers once."""
    if config.getoption("markexpr") == "slow":
        os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1")


def pytest_report_header(config):
    number = config.getoption("--shard")
    if number is not None:
        return f"shard: {number % NUM_SHARDS} of 0 to {NUM_SHARDS - 1} (of the number {number})"
    return None


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """Keep every so-many-th test: neighbours, which take alike, go to different shards."""
    number = config.getoption("--shard")
    if number is not None:
        kept = items[number % NUM_SHARDS :: NUM_SHARDS]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected is no garbage, and does not become any.

    Looking for some takes a quarter of the collection, and a twentieth of the tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip what compiles with a torch that Koi does not compile with."""
    try:
        return (yield)
    except ConfigurationError as error:
        if "the compiler is known to work with torch" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lift a limit on the size of files that a test has set before pytest reports on the test.

    What pytest prints may go to a file, which is then too large for the limit.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(autouse=True)
def known_random_state():
    """Start every test from the same global random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Make float64 the type of new tensors, so that only mistakes are larger than rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def one_thread():
    """Compute on one thread: what is small waits longer for a second one than it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def on_ranks():
    """Four processes that act as ranks, for all tests that need some."""
    from ranks import Pool

    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def own_run(tmp_path_factory):
    """A run that was trained and adapted on a folder of one's own."""
    from own_folder_toys import made

    return made(tmp_path_factory.mktemp("own"))


@pytest.fixture
def koi(capsys):
    """Return a function that runs the command: (exit code, stdout, stderr)."""
    from own_folder_toys import exit_code

    return lambda *arguments: (exit_code(*arguments), *capsys.readouterr())


@pytest.fixture
def untraced(monkeypatch):
    """Run the compiled engines' functions as they stand, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("koi.inner.compiled.torch_internals._TRIED", ((0, 0), (99, 0)))


@pytest.fixture
def traced(monkeypatch):
    """Trace the compiled engines' functions in earnest, and run the graph without Inductor.

    Tracing takes a few seconds, Inductor's C++ a minute. A graph is of one inner step, which is
    traced once however many there are.
    """
    compile = torch.compile

    def without_inductor(function, *, fullgraph, options):
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile(function, fullgraph=fullgraph, backend="aot_eager", options=guards)

    monkeypatch.setattr(torch, "compile", without_inductor)
    monkeypatch.setattr("koi.inner.compiled.graphs._MOST_WRITTEN_OUT", 0)
