"""The history: light in memory, and on disk in a file that only grows, beside the checkpoints."""

import copy
import json
import math
import pickle
import resource
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch

import koi.training.past
from koi import CheckpointError, Koi, KoiWarning
from koi.records import History, Record
from koi.training import logs, whose
from log_toys import SETTINGS, Stop, learner, lines, stops_after
from toys import Regressions, small_net

RECORDS = [
    Record(0, 2.0, 1.0, 0.5, 0.25, 0.125),
    Record(1, math.nan, math.inf, 0.1, 1 / 3, 1e-9, 3, 0.5, None),
    Record(2**40, -0.0, 5e-324, 0.1, 0.2, 0.3, 2, 0.7, 0.25),
]


class TestHistory:
    def test_is_read_like_a_list(self):
        history = History(RECORDS)
        assert list(history) == RECORDS
        assert [history[0], history[-1]] == [RECORDS[0], RECORDS[2]]
        assert history[1:] == RECORDS[1:]
        assert history[::-2] == RECORDS[::-2]
        assert history == RECORDS
        assert history != RECORDS[:2]
        assert repr(history) == repr(RECORDS)
        assert type(history[1].iteration) is type(history[1].num_skipped) is int
        with pytest.raises(IndexError):
            history[3]

    def test_copies_are_equal_and_their_own(self):
        history = History(RECORDS)
        for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
            assert other == history
            other.append(RECORDS[0])
            assert len(history) == 3
        assert History.of(history.rows(0, 3)) == history
        assert History.of(history.rows(1, 2)) == RECORDS[1:2]

    def test_takes_72_bytes_a_record(self):
        history = History(RECORDS[0] for _ in range(1000))
        assert len(history.rows(0, 1000)) == 72_000
        assert history._values.buffer_info()[1] == 9000

    def test_last_record_gets_its_validation(self):
        history = History(RECORDS)
        for value in (0.5, None):
            history.validated(value)
            assert history == [*RECORDS[:2], replace(RECORDS[2], validation=value)]


def bytes_of(folder):
    return (folder / "history.f64").read_bytes()


class TestOnDisk:
    """In blocks of three records, a thousand as it were."""

    @pytest.fixture(autouse=True)
    def blocks_of_three(self, monkeypatch):
        monkeypatch.setattr(koi.training.past, "_BLOCK", 3)

    @pytest.fixture
    def whole(self, tmp_path):
        whole = learner(num_iterations=14)
        whole.train(Regressions(), checkpoint_dir=tmp_path / "whole", checkpoint_every=1)
        return whole

    def test_checkpoints_hold_its_end_and_the_file_the_rest(self, whole, tmp_path):
        folder = tmp_path / "whole"
        assert bytes_of(folder) == whole.history.rows(0, 9)
        loaded = Koi.load(folder / "iteration-000000014.safetensors", small_net())
        assert loaded.history == whole.history
        data = koi.storage.read(folder / "iteration-000000014.safetensors")["history"]
        assert (data["before"], data["rows"].shape) == (9, (5, 9))

    def test_short_trainings_have_no_file(self, tmp_path):
        learner(num_iterations=5).train(Regressions(), checkpoint_dir=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["iteration-000000005.safetensors"]

    def test_by_hand_all_is_in_one(self, whole, tmp_path):
        """A file that goes elsewhere, and a dictionary in another program's checkpoint."""
        whole.save(tmp_path / "koi")
        assert Koi.load(tmp_path / "koi", small_net()).history == whole.history
        other = learner(num_iterations=14)
        other.load_state_dict(whole.state_dict())
        assert other.history == whole.history

    def test_best_has_its_history_too(self, tmp_path):
        values = [*range(12, 0, -1), 5, 5]
        measure = lambda koi: values[koi.iteration - 1]  # noqa: E731
        koi = learner(num_iterations=14)
        options = {"validate": measure, "validate_every": 1, "checkpoint_dir": tmp_path}
        koi.train(Regressions(), **options)
        best = Koi.load(tmp_path / "best.safetensors", small_net())
        assert best.iteration == 12
        assert best.history == koi.history[:12]

    @pytest.mark.parametrize("killed", [7, 10, 13])
    def test_killed_it_goes_on_from_an_earlier_checkpoint(self, killed, tmp_path):
        """The file is ahead of it, and its last row is half written."""
        with pytest.raises(Stop):
            learner(num_iterations=14).train(
                Regressions(), callbacks=[stops_after(killed)], checkpoint_dir=tmp_path
            )
        left = tmp_path / "left"
        shutil.copytree(tmp_path, left)
        learner(num_iterations=14).train(Regressions(), checkpoint_dir=tmp_path, resume=True)
        (left / "history.f64").write_bytes(bytes_of(tmp_path) + b"half")
        again = learner(num_iterations=14)
        again.train(Regressions(), checkpoint_dir=left, checkpoint_every=1, resume=True)
        assert [record.iteration for record in again.history] == list(range(14))
        loaded = Koi.load(left / "iteration-000000014.safetensors", small_net())
        assert loaded.history == again.history
        assert bytes_of(left)[: 9 * 72] == again.history.rows(0, 9)

    @pytest.mark.parametrize("harm", ["is gone", "is cut", "is changed", "is a folder"])
    def test_file_that_is_lost(self, harm, whole, tmp_path):
        """φ goes on all the same; what was there is kept, what is known is written."""
        folder = tmp_path / "whole"
        file = folder / "history.f64"
        content = bytes_of(folder)
        file.unlink()
        if harm == "is a folder":
            file.mkdir()
        elif harm != "is gone":
            file.write_bytes(content[:-1] if harm == "is cut" else b"x" + content[1:])
        koi = learner(num_iterations=14)
        words = "with the first 9 records .* koi.history begins after them; nothing else is missing"
        with pytest.warns(KoiWarning, match=words):
            koi.train(Regressions(), checkpoint_dir=folder, resume=True)
        assert koi.history == whole.history[9:]
        assert koi.state_dict()["params"].keys() == whole.state_dict()["params"].keys()
        assert all(
            map(torch.equal, koi.model.state_dict().values(), whole.model.state_dict().values())
        )

    def test_goes_on_without_its_beginning(self, whole, tmp_path):
        """As does its log, which has the lines that the history has lost."""
        run = tmp_path / "run"
        options = {"checkpoint_dir": run, "log_dir": run, "checkpoint_every": 1}
        constant = {"num_iterations": 24, "meta_step_size": 0.5}
        with pytest.raises(Stop):
            learner(**constant).train(Regressions(), callbacks=[stops_after(12)], **options)
        (run / "history.f64").write_bytes(b"of somebody else")
        koi = learner(**constant)
        with pytest.warns(KoiWarning, match=r"history\.f64 is not there, or not as it was"):
            koi.train(Regressions(), **options, resume=True)
        assert [record.iteration for record in koi.history] == list(range(9, 24))
        assert [line["iteration"] for line in lines(run)] == list(range(24))
        assert (run / "history.f64.old").read_bytes() == b"of somebody else"
        loaded = Koi.load(run / "iteration-000000024.safetensors", small_net())
        assert loaded.history == koi.history

    def test_full_disk(self, tmp_path):
        """Half a block is written; training stops with the reason, and goes on."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def full(koi, record):
            if record.iteration == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 72, limits[1]))

        run = learner(num_iterations=14)
        options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
        with pytest.raises(CheckpointError, match=r"history\.f64 cannot be written \(File too"):
            run.train(Regressions(), callbacks=[full], **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert run.iteration == 9
        assert Koi.load(tmp_path / "iteration-000000008.safetensors", small_net()).iteration == 8
        run.train(Regressions(), **options)
        assert bytes_of(tmp_path) == run.history.rows(0, 9)

    def test_somebody_removes_it_while_a_training_runs(self, tmp_path):
        def remove(koi, record):
            if record.iteration == 9:
                (tmp_path / "history.f64").unlink()

        run = learner(num_iterations=14)
        options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
        with pytest.raises(CheckpointError, match=r"history\.f64 cannot be written \(No such file"):
            run.train(Regressions(), callbacks=[remove], **options)
        run.train(Regressions(), **options)
        assert bytes_of(tmp_path) == run.history.rows(0, 9)

    def test_somebody_clears_the_history(self, tmp_path):
        """It begins anew; what the file held goes aside."""
        clear = lambda koi, record: koi.history.clear() if record.iteration == 8 else None  # noqa: E731
        koi = learner(num_iterations=18)
        koi.train(Regressions(), callbacks=[clear], checkpoint_dir=tmp_path, checkpoint_every=1)
        assert [record.iteration for record in koi.history] == list(range(9, 18))
        loaded = Koi.load(tmp_path / "iteration-000000018.safetensors", small_net())
        assert loaded.history == koi.history


def with_records(number, **settings):
    """Return a learner that has done so many meta-iterations, as it were."""
    koi = learner(num_iterations=number + 10, **settings)
    state = koi.state_dict()
    rows = torch.rand(number, 9, dtype=torch.float64)
    rows[:, 0], rows[:, 6] = torch.arange(number), 0  # iteration, num_skipped
    state["history"]["rows"], state["iteration"] = rows, number
    koi.load_state_dict(state)
    return koi


@pytest.mark.parametrize("done", [3000, 30_000])
def test_a_save_writes_the_same_however_many_there_are(done, tmp_path):
    """A block for each thousand meta-iterations, and a checkpoint of at most two blocks."""
    koi = with_records(done)
    koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=1)
    file = tmp_path / "history.f64"
    assert file.stat().st_size == (done - 1000) * 72
    size = (tmp_path / f"iteration-{done + 10:09d}.safetensors").stat().st_size
    assert 1000 * 72 < size < 2000 * 72 + 20_000
    before = file.stat().st_mtime_ns
    koi.num_iterations += 10
    koi.train(Regressions(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert file.stat().st_mtime_ns == before


def test_reopening_a_log_looks_at_its_ends_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    koi = with_records(5000)
    koi.train(Regressions(), log_dir=tmp_path)
    assert lines(tmp_path) == [asdict(record) for record in koi.history]
    encoded, seen = whose.encoded, []

    def counted(records):
        records = list(records)
        seen.append(len(records))
        return encoded(records)

    monkeypatch.setattr(whose, "encoded", counted)
    monkeypatch.setattr(logs, "encoded", counted)
    koi.num_iterations += 10
    koi.train(Regressions(), log_dir=tmp_path)
    assert sum(seen) < 3000
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(5020))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1000])
    koi.train(Regressions(), log_dir=tmp_path)
    assert lines(tmp_path) == [asdict(record) for record in koi.history]


def test_checkpoints_of_before_are_read():
    """Those had a tensor for each column, some of them fewer columns."""
    koi = learner()
    koi.train(Regressions())
    state = koi.state_dict()
    columns = state["history"]["columns"]
    names = [name for name in columns if name not in ("validation", "meta_gradient_norm")]
    values = dict(zip(columns, state["history"]["rows"].T, strict=True))
    state["history"] = {
        name: values[name].long() if name in ("iteration", "num_skipped") else values[name]
        for name in names
    }
    for name in ("mean", "best", "owed"):
        del state[name]
    other = learner()
    other.load_state_dict(state)
    assert other.history == [replace(r, meta_gradient_norm=math.nan) for r in koi.history]
    with pytest.raises(CheckpointError, match="holds no learner"):
        other.load_state_dict({})


def test_history_of_other_columns_is_read():
    """As one of a Koi that knew fewer."""
    koi = learner()
    koi.train(Regressions())
    state = koi.state_dict()
    state["history"]["columns"] = state["history"]["columns"][:-2]
    state["history"]["rows"] = state["history"]["rows"][:, :-2].contiguous()
    other = learner()
    other.load_state_dict(state)
    assert other.history == [replace(r, meta_gradient_norm=math.nan) for r in koi.history]


@pytest.mark.parametrize("harm", ["rows", "columns", "before"])
def test_history_that_makes_no_sense(harm):
    koi = learner()
    koi.train(Regressions())
    state = koi.state_dict()
    wrong = {"rows": torch.zeros(5), "columns": ["iteration"], "before": -1}
    state["history"][harm] = wrong[harm]
    other = Koi(small_net(), **SETTINGS)
    with pytest.raises(CheckpointError, match="is not whole"):
        other.load_state_dict(state)


def test_validation_that_was_interrupted_is_in_the_log(tmp_path):
    """Its line was written without it where the training was stopped."""

    def validate(koi):
        if koi.iteration == 4 and not stopped:
            stopped.append(koi)
            raise KeyboardInterrupt
        return 0.5

    stopped = []
    options = {"validate": validate, "validate_every": 2, "log_dir": tmp_path}
    folders = {"checkpoint_dir": tmp_path / "saved", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        learner().train(Regressions(), **options, **folders)
    assert [line["validation"] for line in lines(tmp_path)] == [None, 0.5, None, None]
    koi = learner()
    koi.train(Regressions(), **options, **folders)
    assert lines(tmp_path) == [asdict(record) for record in koi.history]
    found = [line["validation"] for line in lines(tmp_path)]
    assert found == [None, 0.5, None, 0.5, None, 0.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])["iteration"] == 3
