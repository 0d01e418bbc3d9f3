"""A disk or folder that fails while a checkpoint is written: nothing is lost, and it says why."""

import errno
import os
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest

from koi import CheckpointError, Koi
from test_checkpoints import SETTINGS, trained
from toys import Point, Regressions, assert_same, small_net, snapshot


def failing(code):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    return fail


FAULTS = {
    "disk full at the end": (os, "fsync", errno.ENOSPC),
    "no rename": (Path, "replace", errno.EROFS),
}


class TestFaults:
    @pytest.fixture(params=[*FAULTS, "no new file", "disk full in the middle"])
    def fault(self, request, monkeypatch):
        """A file system that fails, as a function that makes it so."""
        if request.param in FAULTS:
            module, name, code = FAULTS[request.param]
            yield lambda: monkeypatch.setattr(module, name, failing(code))
            return
        if request.param == "no new file":
            real = Path.open

            def only_read(path, mode="r", *arguments, **options):
                if "w" in mode:
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
                return real(path, mode, *arguments, **options)

            yield lambda: monkeypatch.setattr(Path, "open", only_read)
            return
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # conftest lifts it

    def test_earlier_file_stays(self, fault, tmp_path):
        path = tmp_path / "koi"
        Koi(small_net()).save(path)
        before = path.read_bytes()
        fault()
        with pytest.raises(CheckpointError, match=r"koi cannot be written \(.+\): φ and earlier"):
            trained().save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_training_stops_with_the_reason(self, fault, tmp_path):
        model = small_net()
        seen = []

        def look(koi, record):
            seen.append(snapshot(model))
            if record.iteration == 2:
                fault()

        koi = Koi(model, **SETTINGS, seed=0)
        with pytest.raises(CheckpointError, match=r"000000003\.safetensors cannot be written"):
            koi.train(Regressions(), None, [look], tmp_path, checkpoint_every=1)
        assert koi.iteration == 3
        assert_same(model, seen[-1])
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["iteration-000000001.safetensors", "iteration-000000002.safetensors"]

    def test_error_that_stopped_the_training_is_the_one_raised(self, fault, tmp_path):
        def stop(koi, record):
            fault()
            raise KeyboardInterrupt

        koi = Koi(small_net(), **SETTINGS)
        with pytest.raises(KeyboardInterrupt) as caught:
            koi.train(Regressions(), callbacks=[stop], checkpoint_dir=tmp_path)
        if hasattr(caught.value, "__notes__"):
            assert "cannot be written" in caught.value.__notes__[0]
        assert list(tmp_path.iterdir()) == []

    def test_goes_on_once_there_is_room(self, tmp_path, monkeypatch):
        koi = Koi(small_net(), **SETTINGS, seed=0)
        whole = Koi(small_net(), **SETTINGS, seed=0)
        whole.model.load_state_dict(koi.model.state_dict())
        whole.train(Regressions())
        fault = lambda *_: monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))  # noqa: E731
        with pytest.raises(CheckpointError, match="No space left"):
            koi.train(Regressions(), None, [fault], tmp_path, checkpoint_every=2)
        monkeypatch.undo()
        koi.train(Regressions(), None, (), tmp_path, checkpoint_every=2)
        assert_same(koi.model, whole.model)
        assert len(list(tmp_path.iterdir())) == 1

    def test_folder_that_vanishes(self, tmp_path):
        vanish = lambda koi, record: shutil.rmtree(tmp_path / "run")  # noqa: E731
        koi = Koi(small_net(), **SETTINGS)
        with pytest.raises(CheckpointError, match="No such file or directory"):
            koi.train(Regressions(), None, [vanish], tmp_path / "run", checkpoint_every=1)
        assert koi.iteration == 1
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_cannot_be_written_is_found_at_once(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("mine")
        koi = Koi(small_net(), **SETTINGS)
        with pytest.raises(CheckpointError, match=r"checkpoint_dir .* cannot be written to"):
            koi.train(Regressions(), checkpoint_dir=tmp_path / "file")
        monkeypatch.setattr(Path, "write_bytes", failing(errno.EROFS))
        with pytest.raises(CheckpointError, match="Read-only file system"):
            koi.train(Regressions(), checkpoint_dir=tmp_path)
        assert koi.iteration == 0

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            Koi(small_net()).save(tmp_path / "koi")
        tmp_path.chmod(0o700)
        assert list(tmp_path.iterdir()) == []

    def test_content_is_on_the_disk_before_its_name(self, tmp_path, monkeypatch):
        """Else a power loss could leave an empty file under the real name."""
        order = []
        real_sync, real_replace = os.fsync, Path.replace

        def sync(handle):
            order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
            real_sync(handle)

        def replace(path, target):
            order.append("name")
            return real_replace(path, target)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", replace)
        Koi(Point(1.0)).save(tmp_path / "koi")
        assert order == ["file", "name", "folder"]

    def test_ctrl_c_while_saving(self, tmp_path, monkeypatch):
        real = os.fsync

        def interrupted(handle):
            os.kill(os.getpid(), signal.SIGINT)
            real(handle)

        koi = Koi(small_net(), **SETTINGS)
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=2)
        monkeypatch.undo()
        (path,) = tmp_path.iterdir()
        loaded = Koi.load(path, small_net())
        assert loaded.iteration == koi.iteration == 2
        assert_same(loaded.model, koi.model)
