"""What a training writes of itself: whole lines, each once, and never at the cost of φ."""

import os
import resource
import shutil
import sys
from dataclasses import asdict

import pytest

import koi.training.logs
from koi import ConfigurationError, Koi, KoiWarning
from koi.training.logs import append
from log_toys import SETTINGS, Stop, curve, learner, lines, next_second, stops_after
from toys import InTurn, Point, Quadratic, Regressions, assert_same


def test_log_is_the_history(tmp_path):
    koi = learner()
    koi.train(Regressions(), log_dir=tmp_path / "new" / "run")
    assert lines(tmp_path / "new" / "run") == [asdict(record) for record in koi.history]


def test_curves_in_tensorboard(tmp_path):
    koi = learner()
    koi.train(Regressions(), log_dir=tmp_path)
    for name in ["loss_before", "loss_after", "meta_step_size", "update_norm", "seconds"]:
        expected = [(r.iteration, pytest.approx(getattr(r, name))) for r in koi.history]
        assert curve(tmp_path, name) == expected


def test_curves_of_a_long_training_are_means(tmp_path, monkeypatch):
    monkeypatch.setattr(koi.training.logs, "_POINTS", 3)
    learned = learner()
    with pytest.raises(Stop):
        learned.train(Regressions(), callbacks=[stops_after(3)], log_dir=tmp_path)
    next_second()
    learned.train(Regressions(), log_dir=tmp_path)
    losses = [record.loss_before for record in learned.history]
    assert curve(tmp_path) == [
        (last, pytest.approx((losses[last - 1] + losses[last]) / 2)) for last in (1, 3, 5)
    ]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    learner().train(Regressions(), log_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("saved_at", [1, 4])
def test_curves_of_a_killed_training_have_no_seam(saved_at, tmp_path):
    """It wrote more after its last checkpoint, and the last line only in part."""
    run = tmp_path / "run"
    folders = {"checkpoint_dir": run, "log_dir": run}
    with pytest.raises(Stop):
        learner().train(Regressions(), callbacks=[stops_after(saved_at)], **folders)
    checkpoint = run / f"iteration-00000000{saved_at}.safetensors"
    content = checkpoint.read_bytes()
    next_second()
    with pytest.raises(Stop):
        learner().train(Regressions(), callbacks=[stops_after(5)], **folders, resume=True)
    for path in run.glob("*.safetensors"):
        path.unlink()
    checkpoint.write_bytes(content)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "loss_bef')

    next_second()
    koi = learner()
    koi.train(Regressions(), **folders, resume=True)
    assert lines(run) == [asdict(record) for record in koi.history]
    expected = [(record.iteration, pytest.approx(record.loss_before)) for record in koi.history]
    assert curve(run) == expected


class TestWithoutEnd:
    """What lies under a log's name is read no further than it must."""

    @pytest.mark.parametrize("name", ["metrics.jsonl", "begun.jsonl"])
    def test_a_pipe(self, name, tmp_path):
        (tmp_path / "log").mkdir()
        os.mkfifo(tmp_path / "log" / name)
        options = {"checkpoint_dir": tmp_path / "log", "resume": True, "log_dir": tmp_path / "log"}
        if name == "begun.jsonl":
            learner().train(Regressions(), **options)  # which says nothing
            return
        with pytest.raises(ConfigurationError, match="it is a pipe or a device"):
            learner().train(Regressions(), **options)

    def test_a_line_without_end(self, tmp_path):
        """Of a terabyte, which takes no place."""
        path = tmp_path / "metrics.jsonl"
        path.touch()
        os.truncate(path, 2**26)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ConfigurationError, match="holds 0 lines that this training"):
            learner().train(
                Regressions(), checkpoint_dir=tmp_path / "c", resume=True, log_dir=tmp_path
            )
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB

    def test_what_is_added_to(self, tmp_path):
        path = tmp_path / "validation.jsonl"
        path.touch()
        os.truncate(path, 2**40)
        with pytest.raises(OSError, match="more than 67,108,864 bytes"):
            append(path, {"iteration": 3})
        assert path.stat().st_size == 2**40


def test_a_callback_that_changes_the_current_folder(tmp_path, monkeypatch):
    """The second half of the training went into another folder of that name."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "elsewhere/run"):
        (tmp_path / name).mkdir(parents=True)

    def leave(koi, record):
        if record.iteration == 1:
            os.chdir("elsewhere")

    koi = learner()
    options = {"checkpoint_dir": "run", "checkpoint_every": 1, "log_dir": "run"}
    koi.train(Regressions(), callbacks=[leave], **options)
    assert not list((tmp_path / "elsewhere" / "run").iterdir())
    assert len(lines(tmp_path / "run")) == koi.iteration


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"log_dir .*file cannot be written to"):
        learner().train(Regressions(), log_dir=tmp_path / "file")


def test_no_number_where_all_tasks_were_skipped(tmp_path):
    koi = Koi(Point(1.0), **SETTINGS, on_nonfinite="skip")
    koi.train(InTurn(Quadratic(0.0), Quadratic(float("nan"))), log_dir=tmp_path)
    assert [line["loss_before"] is None for line in lines(tmp_path)] == [False, True] * 3


def test_records_are_gathered_and_there_when_a_checkpoint_is(tmp_path, monkeypatch):
    monkeypatch.setattr(koi.training.logs, "_PATIENCE", float("inf"))
    seen = []
    learned = learner()
    look = lambda *_: seen.append(len(lines(tmp_path)))  # noqa: E731
    learned.train(
        Regressions(), None, [look], tmp_path / "saved", checkpoint_every=2, log_dir=tmp_path
    )
    assert seen == [0, 0, 2, 2, 4, 4]
    assert len(lines(tmp_path)) == 6


def test_records_wait_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(koi.training.logs, "_PATIENCE", -1)
    seen = []
    look = lambda *_: seen.append(len(lines(tmp_path)))  # noqa: E731
    learner().train(Regressions(), callbacks=[look], log_dir=tmp_path)
    assert seen == [0, 1, 2, 3, 4, 5]


class TestFaults:
    @pytest.fixture(autouse=True)
    def at_every_record(self, monkeypatch):
        monkeypatch.setattr(koi.training.logs, "_PATIENCE", -1)

    @pytest.fixture
    def whole(self):
        whole = learner()
        whole.train(Regressions())
        return whole

    def test_folder_that_vanishes_and_comes_back(self, whole, tmp_path):
        def disturb(koi, record):
            if record.iteration == 1:
                shutil.rmtree(tmp_path / "run")
            if record.iteration == 4:
                (tmp_path / "run").mkdir()

        koi = learner()
        with pytest.warns(KoiWarning, match=r"No such file.*the training goes on") as caught:
            koi.train(Regressions(), callbacks=[disturb], log_dir=tmp_path / "run")
        assert len(caught) == 1
        assert_same(koi.model, whole.model)
        assert lines(tmp_path / "run") == [asdict(record) for record in koi.history]

    def test_full_disk(self, whole, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        koi = learner()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            with pytest.warns(KoiWarning, match="the training goes on") as caught:
                koi.train(Regressions(), log_dir=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(caught) == 1
        assert_same(koi.model, whole.model)
        written = lines(tmp_path)
        assert 0 < len(written) < 6
        assert written == [asdict(record) for record in koi.history[: len(written)]]

    def test_tensorboard_that_fails(self, whole, tmp_path, monkeypatch):
        def fail(writer):
            raise OSError("No space left on device")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", fail)
        koi = learner()
        with pytest.warns(KoiWarning, match=r"No space left on device.*giving them up") as caught:
            koi.train(Regressions(), log_dir=tmp_path)
        assert len(caught) == 1
        assert_same(koi.model, whole.model)
        assert len(lines(tmp_path)) == 6

    def test_file_that_somebody_cut(self, tmp_path):
        def cut(koi, record):
            if record.iteration == 3:
                (tmp_path / "metrics.jsonl").write_text('{"iter')

        koi = learner()
        koi.train(Regressions(), callbacks=[cut], log_dir=tmp_path)
        assert lines(tmp_path) == [asdict(record) for record in koi.history]


class TestAppend:
    def test_goes_on_where_a_killed_training_goes_on(self, tmp_path):
        path = tmp_path / "validation.jsonl"
        for iteration in (0, 10, 20, 30):
            append(path, {"iteration": iteration, "run": 1})
        with path.open("a") as file:
            file.write('{"iteration": 40, "ru')
        for iteration in (20, 30):
            append(path, {"iteration": iteration, "run": 2})
        assert [(line["iteration"], line["run"]) for line in lines(tmp_path, path.name)] == [
            (0, 1),
            (10, 1),
            (20, 2),
            (30, 2),
        ]

    def test_what_is_taken_out_is_kept(self, tmp_path):
        """It may be another training's: nothing that was measured is lost."""
        path = tmp_path / "validation.jsonl"
        for run, iterations in enumerate([(0, 10, 20), (10,), (0,)]):
            for iteration in iterations:
                append(path, {"iteration": iteration, "run": run})
        assert lines(tmp_path, path.name) == [{"iteration": 0, "run": 2}]
        assert [
            (line["iteration"], line["run"]) for line in lines(tmp_path, f"{path.name}.old")
        ] == [
            (10, 0),
            (20, 0),
            (0, 0),
            (10, 1),
        ]

    @pytest.mark.parametrize(
        "content", ["mine\n", '{"epoch": 1}\n', "[1]\n", '{"iteration": "1"}\n']
    )
    def test_a_file_of_something_else_is_left_alone(self, content, tmp_path):
        path = tmp_path / "validation.jsonl"
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"validation\.jsonl holds lines that"):
            append(path, {"iteration": 0})
        assert path.read_text() == content
        assert list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_written_leaves_what_was(self, tmp_path):
        path = tmp_path / "validation.jsonl"
        append(path, {"iteration": 0})
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                append(path, {"iteration": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
