"""A log goes on where its training does; what another one wrote is refused, and left as it is."""

import shutil
from dataclasses import asdict

import pytest

import koi.training.logs
from koi import ConfigurationError, Koi, KoiWarning
from log_toys import Stop, curve, learner, lines, next_second, stops_after
from toys import Regressions, small_net


class TestWhoseLog:
    """What this very training did not write is refused, and left as it is."""

    @pytest.fixture(autouse=True)
    def at_every_record(self, monkeypatch):
        monkeypatch.setattr(koi.training.logs, "_PATIENCE", -1)

    @pytest.fixture(params=["one folder", "two folders"])
    def killed(self, request, tmp_path):
        """The folders of a training that was killed before its first checkpoint."""
        names = ("run", "run") if request.param == "one folder" else ("run/saved", "run/log")
        saved, log = (tmp_path / name for name in names)
        left = tmp_path / "left"

        def kill(koi, record):
            if record.iteration == 3:
                shutil.copytree(tmp_path / "run", left)

        learner(num_iterations=4).train(
            Regressions(), callbacks=[kill], checkpoint_dir=saved, log_dir=log, resume=True
        )
        assert not list(left.rglob("*.safetensors"))
        return {
            "checkpoint_dir": left / saved.relative_to(tmp_path / "run"),
            "log_dir": left / log.relative_to(tmp_path / "run"),
        }

    def test_killed_before_the_first_checkpoint(self, killed):
        assert len(lines(killed["log_dir"])) == 3
        with (killed["log_dir"] / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 3, "loss_bef')
        koi = learner()
        koi.train(Regressions(), **killed, resume=True)
        assert lines(killed["log_dir"]) == [asdict(record) for record in koi.history]
        kept = {path.name for path in killed["checkpoint_dir"].glob("*.jsonl")}
        assert kept <= {"metrics.jsonl"}

    def test_killed_once_more(self, killed, tmp_path):
        """After its log was emptied, and with lines that are new."""
        emptied, again = (tmp_path / name for name in ("emptied", "again"))

        def kill(koi, record):
            if record.iteration in (0, 2):
                shutil.copytree(tmp_path / "left", again if record.iteration else emptied)

        learner(num_iterations=3).train(Regressions(), callbacks=[kill], **killed, resume=True)
        for left in (emptied, again):
            folders = {k: left / v.relative_to(tmp_path / "left") for k, v in killed.items()}
            koi = learner()
            koi.train(Regressions(), **folders, resume=True)
            assert lines(folders["log_dir"]) == [asdict(record) for record in koi.history]

    def test_another_one_took_the_log_of_a_killed_training(self, killed, tmp_path):
        log = killed["log_dir"] / "metrics.jsonl"
        log.unlink()
        learner().train(Regressions(), log_dir=killed["log_dir"])
        self.assert_refused(log, r"6 lines .* which has no checkpoint yet,", **killed, resume=True)

    @pytest.mark.parametrize("done", [0, 3, 6])
    def test_log_of_another_training(self, done, tmp_path):
        learner(num_iterations=20).train(Regressions(), log_dir=tmp_path / "log")
        log, saved = tmp_path / "log" / "metrics.jsonl", tmp_path / "saved"
        if done:
            stop = [stops_after(done)]
            with pytest.raises(Stop):
                learner().train(Regressions(), callbacks=stop, checkpoint_dir=saved)
        here = f"has done {done} meta-iterations" if done else "has no checkpoint yet"
        options = {"checkpoint_dir": saved, "log_dir": tmp_path / "log", "resume": True}
        self.assert_refused(log, f"log holds 20 lines .* which {here},", **options)

    def test_loaded_by_hand(self, tmp_path):
        """Without resume, and with a log of as many lines."""
        learner().train(Regressions(), log_dir=tmp_path / "log")
        learner().train(Regressions(), checkpoint_dir=tmp_path / "saved")
        loaded = Koi.load(tmp_path / "saved" / "iteration-000000006.safetensors", small_net())
        with pytest.raises(ConfigurationError, match="did not write"):
            loaded.train(Regressions(), log_dir=tmp_path / "log")

    def test_checkpoints_were_thrown_away(self, tmp_path):
        folders = {"checkpoint_dir": tmp_path, "log_dir": tmp_path}
        learner().train(Regressions(), **folders)
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        self.assert_refused(tmp_path / "metrics.jsonl", "6 lines", **folders, resume=True)

    @pytest.mark.parametrize("content", ["mine", "mine\n", '{"iteration": 0}\n{"iter', "\n"])
    @pytest.mark.parametrize("done", [0, 2])
    def test_something_else(self, content, done, tmp_path):
        log = tmp_path / "metrics.jsonl"
        log.write_text(content)
        if done:
            stop = [stops_after(done)]
            with pytest.raises(Stop):
                learner().train(Regressions(), callbacks=stop, checkpoint_dir=tmp_path)
        options = {"checkpoint_dir": tmp_path, "log_dir": tmp_path, "resume": True}
        self.assert_refused(log, "did not write", **options)

    def test_two_at_a_time(self, tmp_path):
        """The second began while the first had written nothing."""
        log = tmp_path / "metrics.jsonl"

        def other(koi, record):
            if record.iteration == 0:
                log.write_text('{"iteration": 0, "loss_before": 1.0}\n')

        koi = learner()
        match = r"cannot be written \(another training writes there\).*the training goes on"
        with pytest.warns(KoiWarning, match=match) as caught:
            koi.train(Regressions(), callbacks=[other], log_dir=tmp_path)
        assert len(caught) == 1
        assert koi.iteration == 6
        assert lines(tmp_path) == [{"iteration": 0, "loss_before": 1.0}]

    def test_curves_that_somebody_draws_there_stay(self, tmp_path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(tmp_path) as board:
            board.add_scalar("own", 1.0, 3)
        next_second()
        learner().train(Regressions(), log_dir=tmp_path)
        assert curve(tmp_path, "own") == [(3, 1.0)]

    @staticmethod
    def assert_refused(log, match, **options):
        before = log.read_bytes()
        with pytest.raises(ConfigurationError, match=match):
            learner().train(Regressions(), **options)
        assert log.read_bytes() == before


def test_folder_of_another_training_is_refused(tmp_path):
    learner().train(Regressions(), log_dir=tmp_path)
    before = lines(tmp_path)
    koi = learner()
    with pytest.raises(ConfigurationError, match="holds the log of an earlier training"):
        koi.train(Regressions(), log_dir=tmp_path)
    assert koi.iteration == 0
    assert lines(tmp_path) == before
