"""One training at a time in a checkpoint_dir, by a lock that the kernel frees with its holder."""

import errno
import os
import re
import socket
import subprocess
import sys
import warnings

import pytest

from koi import CheckpointError, Koi
from log_toys import learner
from toys import Regressions, assert_same, small_net, snapshot

fcntl = pytest.importorskip("fcntl")

# What a training does with the lock, in a process that starts in no time.
HOLDER = """
import fcntl, os, socket, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
print("held", flush=True)
time.sleep(60)
"""


def named(pid):
    return re.escape(
        f"is in use by another training (process {pid} on {socket.gethostname()}): let"
    )


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    """What it leads to was emptied."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        learner().train(Regressions(), checkpoint_dir=folder)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_another_process_is_refused_and_left_alone(resume, holder, tmp_path):
    own = tmp_path / ".iteration-000000003.safetensors.1.tmp"  # it may be writing that just now
    own.write_text("of the other process")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = small_net()
    start, koi = snapshot(model), Koi(model, num_iterations=2)
    with pytest.raises(CheckpointError, match=named(holder.pid)):
        koi.train(Regressions(), checkpoint_dir=tmp_path, resume=resume)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert koi.iteration == 0
    assert_same(model, start)


def test_kill_9_frees_it(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    learner().train(Regressions(), checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-000000006.safetensors"]


def test_another_learner_of_this_process(tmp_path):
    """Which is one training for each folder, too."""

    def nested(koi, record):
        with pytest.raises(CheckpointError, match=named(os.getpid())):
            learner().train(Regressions(), checkpoint_dir=tmp_path, resume=True)
        learner().train(Regressions(), checkpoint_dir=tmp_path / f"other-{record.iteration}")

    koi = learner()
    koi.train(Regressions(), callbacks=[nested], checkpoint_dir=tmp_path)
    assert koi.iteration == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_whatever_stops_a_training_frees_it(error, tmp_path):
    def stop(koi, record):
        raise error

    koi = learner()
    with pytest.raises(error):
        koi.train(Regressions(), callbacks=[stop], checkpoint_dir=tmp_path)
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(CheckpointError, match="holds an earlier training"):
        learner().train(Regressions(), checkpoint_dir=tmp_path)
    koi.train(Regressions(), checkpoint_dir=tmp_path)
    assert koi.iteration == 6


def test_a_fork_does_not_keep_it(tmp_path):
    """Such as a worker that loads data, which may outlive its training."""
    end, here = os.pipe()
    children = []

    def fork(koi, record):
        if not children:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
                child = os.fork()
            if child == 0:
                os.close(here)
                os.read(end, 1)
                os._exit(0)
            children.append(child)

    try:
        learner().train(Regressions(), callbacks=[fork], checkpoint_dir=tmp_path)
        learner().train(Regressions(), checkpoint_dir=tmp_path, resume=True)
    finally:
        os.close(here)
        os.close(end)
    assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_file_systems_without_locks(code, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    learner().train(Regressions(), checkpoint_dir=tmp_path)
    assert (tmp_path / "iteration-000000006.safetensors").exists()


def test_file_that_its_last_holder_has_just_removed(tmp_path, monkeypatch):
    """Locked a moment too late, it is nobody's; the one under the name counts."""
    real, removed = fcntl.flock, []

    def late(handle, how):
        real(handle, how)
        if not removed:
            removed.append((tmp_path / ".lock").stat().st_ino)
            (tmp_path / ".lock").rename(tmp_path / "elsewhere")

    def look(koi, record):
        assert (tmp_path / ".lock").stat().st_ino != removed[0]
        assert (
            tmp_path / ".lock"
        ).read_text() == f"process {os.getpid()} on {socket.gethostname()}"

    monkeypatch.setattr(fcntl, "flock", late)
    learner().train(Regressions(), callbacks=[look], checkpoint_dir=tmp_path)
    assert not (tmp_path / ".lock").exists()
