"""benchmarks/gpu.py, which runs where nobody watches: all of it that needs no GPU."""

import contextlib
import csv
import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from koi.recipes import RECIPES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.fixture
def session(gpu, tmp_path):
    return gpu.Session(tmp_path / "out", "cpu", 6000, {"date": "today"})


def step(gpu, session, name, code, limit=600.0):
    """A step that is a line of Python; FOLDER in it is where its tables go."""
    folder = session.out / name
    folder.mkdir(exist_ok=True)
    return gpu.Step(name, [sys.executable, "-c", code.replace("FOLDER", repr(str(folder)))], limit)


@contextlib.contextmanager
def stopped_after(file):
    """Let the limit of a step be when it has written a file, however long that takes."""

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            while not file.exists():
                time.sleep(0.01)
            return super().wait(timeout and 0.3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Process)
        yield


WRITE = "import pathlib; pathlib.Path(FOLDER, 'a.md').write_text('# Half a table'); "


class TestSteps:
    def test_what_a_stopped_step_has_written_is_in_the_report(self, gpu, session):
        late = step(gpu, session, "slow", WRITE + "import time; time.sleep(6000)")
        with stopped_after(session.out / "slow" / "a.md"):
            assert not session.run(late)
        assert session.run(step(gpu, session, "next", "print('hello')"))
        assert (session.out / "next.log").read_text() == "hello\n"
        report = (session.out / "report.md").read_text()
        assert "| slow | stopped at its limit |" in report
        assert "## slow\n\nHalf a table" in report
        assert "- date: today" in report

    def test_a_step_that_does_not_listen_is_killed(self, gpu, session, monkeypatch):
        monkeypatch.setattr(gpu, "GRACE", 0.3)
        deaf = (
            "import signal, time; signal.signal(15, signal.SIG_IGN); " + WRITE + "time.sleep(6000)"
        )
        with stopped_after(session.out / "deaf" / "a.md"):
            assert not session.run(step(gpu, session, "deaf", deaf))

    def test_what_a_step_started_ends_with_it(self, gpu, session):
        """Compilers have processes of their own."""
        code = (
            "import subprocess, sys, time; "
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(6000)']); "
            "print(child.pid, flush=True)"
        )
        assert session.run(step(gpu, session, "parent", code))
        pid = int((session.out / "parent.log").read_text())
        state = Path(f"/proc/{pid}/stat")
        while state.exists() and ") Z" not in state.read_text():
            time.sleep(0.05)

    def test_a_second_run_does_what_is_not_done(self, gpu, session):
        count = "open(FOLDER + '/count', 'a').write('x')"
        good = step(gpu, session, "good", count)
        bad = step(gpu, session, "bad", count + "; raise SystemExit(3)")
        for _ in range(2):
            again = gpu.Session(session.out, "cpu", 6000, {})
            assert again.run(good)
            assert not again.run(bad)
        assert again.run(replace(good, anew=True))
        assert (session.out / "good" / "count").read_text() == "xx"
        assert (session.out / "bad" / "count").read_text() == "xx"
        with (session.out / "steps.csv").open(newline="") as file:
            rows = {row[0]: row[1] for row in csv.reader(file)}
        assert rows == {"step": "how it ended", "good": "done", "bad": "failed (exit code 3)"}
        assert not gpu.Session(session.out, "cpu", 0, {}).run(bad)  # no time is left


class Recorded:
    """A session that says of each training whether it came to its end, and runs nothing."""

    total, left, device = 600.0, 500.0, "cuda"

    def __init__(self, out, whole):
        self.out, self.whole, self.steps = out, whole, []

    def run(self, step):
        self.steps.append(step)
        (self.out / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        return self.whole


class TestTraining:
    @pytest.mark.parametrize(("whole", "tasks"), [(True, "10000"), (False, "1000")])
    def test_a_training_is_measured_as_far_as_it_came(self, gpu, tmp_path, whole, tasks):
        session = Recorded(tmp_path, whole)
        checkpoints = tmp_path / "omniglot-5way" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "iteration-00000010.safetensors").touch()
        assert gpu.train(session, "omniglot-5way", None, quick=False) is whole
        training, test = session.steps
        assert training.command[3:5] == ["train", "omniglot-5way"]
        assert shlex.join(training.command).endswith("--validation 0 --test-tasks 0 --compile")
        assert training.limit == 440  # a tenth of the whole time is left for the test
        assert test.command[-2:] == ["--tasks", tasks]
        assert test.limit == (500 if whole else 60)
        assert test.anew is not whole

    def test_without_a_checkpoint_there_is_nothing_to_measure(self, gpu, tmp_path):
        session = Recorded(tmp_path, False)
        assert not gpu.train(session, "omniglot-20way", None, quick=False)
        assert len(session.steps) == 1

    def test_rows(self, gpu, tmp_path):
        assert list(gpu.training_rows(tmp_path, "omniglot-20way")) == []
        lines = [json.dumps({"seconds": s}) for s in (0.5, 0.01, 0.03)] + ['{"seco']
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        (row,) = gpu.training_rows(tmp_path, "omniglot-20way")
        assert row[:6] == ["omniglot-20way", "4", "200,000", "30.00", "", "not measured yet"]
        found = {"inductive": [0.8, 0.01], "transductive": [0.9, 0.02], "num_tasks": 1000}
        results = {"1": found | {"iteration": 3}}
        (tmp_path / "results.json").write_text(json.dumps(results))
        rows = list(gpu.training_rows(tmp_path, "omniglot-20way"))
        assert [row[1:] for row in rows] == [
            ["3", "200,000", "30.00", "1", way, *cells, "1,000"]
            for way, cells in {
                "inductive": ("80.00", "± 1.00", "88.14 ± 0.15"),
                "transductive": ("90.00", "± 2.00", "89.43 ± 0.14"),
            }.items()
        ]

    def test_the_paper_has_the_cells_of_what_is_trained(self, gpu):
        assert all(
            (name, k) in gpu.PAPER for name in gpu.TRAINED for k in RECIPES[name].adaptations
        )


class TestEquality:
    @pytest.fixture
    def equality(self, monkeypatch):
        monkeypatch.syspath_prepend(BENCHMARKS)
        import equality

        return equality

    def test_a_difference_is_told(self, equality, monkeypatch):
        found = {"cpu": 0.0, "cuda": 2e-10}
        monkeypatch.setattr(equality, "outcome", lambda case, engine, device: [found[device]])
        case = ("reptile", "sgd", "mlp")
        assert equality.engines_row(case, "vectorized", "cuda")[:2] == ["**no**", "2.0e-10"]
        assert equality.engines_row(case, "vectorized", "cpu")[:2] == ["yes", "0.0e+00"]
        assert equality.episodes_row("cpu")[:2] == ["yes", "0.0e+00"]

    def test_what_fails_is_a_row(self, equality):
        assert equality.computed(lambda: 1 / 0)[:2] == [
            "**no**",
            "ZeroDivisionError: division by zero",
        ]

    def test_a_gpu_compiles_each_algorithm_optimizer_and_net(self, equality):
        seen = {name for case, _ in equality.COMPILED for name in case}
        expected = {*equality.ALGORITHMS, *equality.OPTIMIZERS, *equality.NETS}
        assert seen == expected
        names = [names for names, _ in equality.rows("cuda", quick=False)]
        assert len(names) == len({tuple(name) for name in names})
        assert names[1][1] == "vectorized+compiled"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_steps_on_the_cpu(tmp_path):
    """With images like Omniglot's in number and size alone."""
    random = np.random.default_rng(0)
    for name, characters in (("background", 964), ("evaluation", 659)):
        images = np.zeros((characters, 20, 105, 105), dtype=bool)
        images[:, :, :20, :20] = random.random((characters, 20, 20, 20)) < 0.5
        np.savez_compressed(tmp_path / f"images_{name}.npz", images=images)
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--quick"]
    command += ["--minutes", "12", "--data", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (out / "steps.csv").open(newline="") as file:
        steps = {row[0]: row[1] for row in list(csv.reader(file))[1:]}
    assert set(steps.values()) == {"done"}, steps
    assert {"equality", "speed-sine-1", "omniglot-5way-test", "omniglot-20way-test"} <= set(steps)
    tables = ["equality/equality.csv", "speed-sine-1/speed-2threads.csv", "training.csv"]
    for table in tables:
        assert len((out / table).read_text().splitlines()) > 1
    assert done.stdout.endswith((out / "report.md").read_text() + "\n")
