"""Several ranks are one training: the same φ, one end for all, whatever happens to one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mortal_run
import rank_runs
import rank_troubles
from engine_toys import ENGINES
from koi import Koi
from koi.inner.compiled.workers import threads
from koi.training.lock import Lock
from ranks import Failed

CASES = [
    ("reptile", "sgd", "mlp"),
    ("reptile", "adam", "conv"),
    ("fomaml", "adam", "conv"),
    ("maml", "sgd", "mlp"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have: with another number of threads sums are rounded otherwise."""
    with threads(1):
        yield


def assert_close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        *((engine, 2) for engine in ENGINES),
        *((engine, size) for engine in ("eager", "vectorized+compiled") for size in (1, 4)),
        *(
            pytest.param(engine, size, marks=pytest.mark.slow)
            for engine in ("vectorized", "compiled")
            for size in (1, 4)
        ),
    ],
)
def test_same_as_one_process(engine, size, on_ranks):
    """Meta-batches of five, so that no two or four ranks have the same number of tasks."""
    for algorithm, optimizer, net in CASES:
        settings = {"algorithm": algorithm, "inner_optimizer": optimizer, "meta_batch_size": 5}
        alone = rank_runs.in_engine(0, engine, net, settings)
        together = on_ranks(size, rank_runs.in_engine, engine, net, settings)
        for rank in together:
            assert_close(rank, alone, tolerance=0 if size == 1 else 1e-10)
        for rank in together[1:]:
            assert_close(rank, together[0], tolerance=0)


@pytest.mark.parametrize("kind", ["plain", "own", "counted", "noise", "weighted", "by themselves"])
def test_tasks_of_every_kind(kind, on_ranks):
    """With a generator, state, draws, weights or an inner loop of their own."""
    alone, _ = rank_runs.one_by_one(0, kind, {"seed": 0})
    torch.manual_seed(100)  # as rank 0 of the pool
    alone, _ = rank_runs.one_by_one(0, kind, {"seed": 0})
    for phi, _ in on_ranks(3, rank_runs.one_by_one, kind, {"seed": 0}):
        assert_close(phi, alone, tolerance=1e-6)  # float32


@pytest.mark.parametrize("kind", ["apart", "together", "counted"])
def test_a_rank_draws_no_more_than_it_must(kind, on_ranks):
    """Its share of five tasks, and with a state all; φ is that of one process."""
    alone, phi = rank_runs.drawing(0, kind)
    found = on_ranks(2, rank_runs.drawing, kind)
    for (start, end), (drawn, own) in zip([(0, 2), (2, 5)], found, strict=True):
        assert_close(own, phi)
        assert drawn == (alone if kind == "counted" else [tasks[start:end] for tasks in alone])
        assert len(drawn) == 5


def test_sample_batch_that_means_another_thing_by_first(on_ranks):
    for end in on_ranks(2, rank_runs.drawing, "wrongly"):
        assert end.kind == "TaskError"
        assert "first=2) of Wrongly does not give tasks 2 to 4 of sample_batch(5" in end.text


def test_data_that_no_other_rank_sees(on_ranks):
    alone = rank_runs.clients(None)
    for phi in on_ranks(3, rank_runs.clients):
        assert_close(phi, alone)
    for end in on_ranks(2, rank_runs.clients, secret=True):
        assert end.kind == "ConfigurationError"
        assert "ClientTasks of Client, which" in end.text


def test_clients_count_as_their_weights_say(on_ranks):
    """Two tasks of centre 1 and weight 1 here, three of centre −3 and weight 4 there.

    Two steps at η = 0.1 take (1 − 0.9²) of the way to a centre, so that each meta-iteration at
    ε = 0.5 takes half of that of the way from φ to the weighted mean of the centres.
    """
    centre = (2 * 1 * 1 + 3 * 4 * -3) / (2 * 1 + 3 * 4)
    closed = centre + (1 - 0.5 * (1 - 0.9**2)) ** 3 * (5 - centre)
    assert on_ranks(2, rank_runs.weighted_clients) == pytest.approx([closed, closed], abs=1e-12)


def test_without_a_seed_ranks_draw_one(on_ranks):
    first, *others = on_ranks(3, rank_runs.one_by_one, "plain", {})
    for other in others:
        assert_close(other, first, tolerance=0)


@pytest.mark.parametrize("kind", ["plain", "counted"])
@pytest.mark.parametrize("seed", [0, None])
def test_resumed_on_ranks(kind, seed, on_ranks, tmp_path):
    """Rank 0 alone has written, the others hear from it; also on another number of ranks."""
    settings = {"seed": seed, "inner_optimizer": "adam"}
    (whole, _), *_ = on_ranks(2, rank_runs.one_by_one, kind, settings)
    part = {**settings, "num_iterations": 3}
    on_ranks(2, rank_runs.one_by_one, kind, part, checkpoint_dir=tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    assert names == ["iteration-000000003.safetensors"]
    for size, tolerance in [(2, 0), (3, 1e-6), (1, 1e-6)]:
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / names[0]).write_bytes((tmp_path / names[0]).read_bytes())
        options = {"checkpoint_dir": folder, "resume": True}
        for phi, length in on_ranks(size, rank_runs.one_by_one, kind, settings, **options):
            assert_close(phi, whole, tolerance)
            assert length == 6


@pytest.mark.parametrize("ranks", [(0, 1), (0,)], ids=["on all", "on rank 0"])
def test_callbacks_with_a_state_go_on_where_they_are(ranks, on_ranks, tmp_path):
    on_ranks(2, rank_runs.counting, ranks, 3, tmp_path)
    counted = on_ranks(2, rank_runs.counting, ranks, 5, tmp_path)
    assert counted == [[5] if rank in ranks else [] for rank in range(2)]


@pytest.mark.parametrize("victim", [0, 1])
def test_what_rank_0s_callbacks_owe_is_owed_on_all(victim, on_ranks, tmp_path):
    rest = [(name, iteration) for iteration in (4, 5) for name in ("first", "second")]
    owed = [("second", 3)] if victim == 0 else []
    for seen in on_ranks(2, rank_troubles.stopped_among_callbacks, victim, tmp_path):
        assert seen == owed + rest


def test_folder_of_another_training_is_refused_on_all(on_ranks, tmp_path):
    """Rank 0 alone looks at it, and all hear of it."""
    lock = Lock(tmp_path)
    lock.take()
    settings, options = {"seed": 0}, {"checkpoint_dir": tmp_path, "resume": True}
    for end in on_ranks(2, rank_runs.one_by_one, "plain", settings, **options):
        assert end.kind == "CheckpointError"
        assert f"in use by another training (process {os.getpid()} on" in end.text
    lock.release()
    for _, length in on_ranks(2, rank_runs.one_by_one, "plain", settings, **options):
        assert length == 6


@pytest.mark.parametrize("stops", [(1,), (0, 1)])
def test_stop_on_any_rank_ends_all(stops, on_ranks):
    """One meta-iteration later, when all know of it."""
    for iteration, _, _ in on_ranks(2, rank_runs.ending, stops):
        assert iteration == 4
    assert rank_runs.ending(0, (0,))[0] == 3


def test_validation_is_rank_0s(on_ranks, tmp_path):
    alone = rank_runs.validated(0, tmp_path / "alone")
    for iteration, best, phi in on_ranks(2, rank_runs.validated, tmp_path / "ranks"):
        assert (iteration, best) == alone[:2]
        assert_close(phi, alone[2], tolerance=1e-6)
    assert alone[0] == 4
    assert (tmp_path / "ranks" / "best.safetensors").exists()


def test_steps_on_ranks(on_ranks):
    for phi in on_ranks(2, rank_runs.stepped):
        assert_close(phi, rank_runs.stepped(0), tolerance=1e-6)


@pytest.mark.parametrize("at", [0, 2])
def test_rank_whose_tasks_are_all_skipped(at, on_ranks):
    torch.manual_seed(100)
    alone = rank_troubles.skipping(0, at)
    assert alone[2] == [2 if iteration == at else 0 for iteration in range(6)]
    for together in on_ranks(2, rank_troubles.skipping, at):
        assert_close(together, alone, tolerance=1e-6)


# what the victim raises, what the others, and what both say
ERRORS = {
    "loss": ("ValueError", "RankError", "no luck"),
    "sample": ("ValueError", "RankError", "no luck"),
    "callback": ("ValueError", "RankError", "no luck"),
    "nan": ("NonFiniteError", "NonFiniteError", "meta-iteration 2, task 2"),
    "Ctrl-C": ("KeyboardInterrupt", "RankError", "KeyboardInterrupt"),
}


class TestTrouble:
    """It meets one rank; all stop, at the same φ, and say which rank it was."""

    @pytest.mark.parametrize("trouble", ERRORS)
    @pytest.mark.parametrize(("victim", "at"), [(1, 2), (0, 0)])
    def test_error(self, trouble, victim, at, on_ranks, tmp_path):
        own, others, text = ERRORS[trouble]
        if at == 0:
            text = text.replace("meta-iteration 2, task 2", "meta-iteration 0, task 0")
        ended = on_ranks(2, rank_troubles.in_trouble, trouble, victim, at, tmp_path, {"seed": 0})
        iteration = at + (trouble == "callback")
        for rank, end in enumerate(ended):
            assert end.iteration == iteration
            assert end.error == (own if rank == victim else others)
            assert f"rank {victim}" in end.text
            assert text in end.error + end.text
        assert_close(ended[0].phi, ended[1].phi, tolerance=0)
        names = [path.name for path in tmp_path.iterdir()]
        assert names == [f"iteration-{iteration:09d}.safetensors"] * (iteration > 0)

    @pytest.mark.parametrize("victim", [0, 1])
    def test_sigterm(self, victim, on_ranks, tmp_path):
        ended = on_ranks(2, rank_troubles.in_trouble, "SIGTERM", victim, 2, tmp_path, {"seed": 0})
        for end in ended:
            assert (end.iteration, end.error, end.code) == (3, "SystemExit", 143)
        assert_close(ended[0].phi, ended[1].phi, tolerance=0)
        assert [path.name for path in tmp_path.iterdir()] == ["iteration-000000003.safetensors"]

    @pytest.mark.parametrize("victim", [0, 1])
    def test_sigterm_where_a_save_is_due(self, victim, on_ranks, tmp_path):
        """They all finish one more; the one that it came to left alone."""
        arguments = ("callback, SIGTERM", victim, 2, tmp_path, {"seed": 0}, 1)
        for end in on_ranks(2, rank_troubles.in_trouble, *arguments):
            assert (end.iteration, end.error, end.code) == (4, "SystemExit", 143)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"iteration-{number:09d}.safetensors" for number in (3, 4)]

    def test_rank_that_hangs(self, on_ranks, tmp_path):
        """It ends in a timeout with its name; where it wakes up, it finds the others gone."""
        settings = {"seed": 0, "vectorize": False}  # of which no step takes seconds
        arguments = ("hangs", 1, 2, tmp_path, settings)
        ended = on_ranks(3, rank_troubles.in_trouble, *arguments, patience=4)
        for rank, end in enumerate(ended):
            assert (end.iteration, end.error) == (2, "RankError")
            if rank != 1:
                assert "rank 1 did not get here" in end.text
        assert_close(ended[0].phi, ended[2].phi, tolerance=0)
        assert [path.name for path in tmp_path.iterdir()] == ["iteration-000000002.safetensors"]

    def test_goes_on_after_trouble(self, on_ranks, tmp_path):
        (whole, _), *_ = on_ranks(2, rank_runs.one_by_one, "plain", {"seed": 0})
        on_ranks(
            2, rank_troubles.in_trouble, "loss", 1, 3, tmp_path, {"seed": 0, "vectorize": False}
        )
        options = {"checkpoint_dir": tmp_path, "resume": True}
        for phi, _ in on_ranks(2, rank_runs.one_by_one, "plain", {"seed": 0}, **options):
            assert_close(phi, whole, tolerance=0)

    def test_rank_0_cannot_save(self, on_ranks, tmp_path):
        first, second = on_ranks(2, rank_troubles.rank_0_cannot_save, tmp_path / "run")
        assert first[:2] == second[:2] == (2, "CheckpointError")
        assert "No such file" in first[2]
        assert "No such file" in second[2]
        assert "(on rank 0)" in second[2]

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            *[("step_size", (0.1, 0.2)), ("num_iterations", (6, 7)), ("check", (True, False))],
            *[
                ("inner_optimizer", ("sgd", "adam")),
                ("validate_every", (2, 3)),
                ("patience", (1, 2)),
            ],
        ],
    )
    def test_settings_that_differ(self, name, values, on_ranks):
        for end in on_ranks(2, rank_troubles.with_settings_of_its_own, name, *values):
            assert end.kind == "ConfigurationError"
            shown = [repr(value) for value in values]
            assert f"{name}: {shown[0]} on rank 0, {shown[1]} on rank 1" in end.text

    def test_rank_that_left_before(self, on_ranks):
        waiting, left = on_ranks(2, rank_troubles.never_comes, "0.5")
        assert left is None
        assert waiting.kind == "RankError"
        assert "no news of rank 1 for 0.5 seconds: has its script ended before" in waiting.text

    def test_rank_that_ends_between_two_trainings(self, on_ranks):
        """Its process has said so; of one that lives on the others wait for, however long."""
        waiting, left = on_ranks(2, rank_troubles.ends_between, True)
        assert (waiting.kind, left) == ("RankError", 6)
        assert "rank 1" in waiting.text
        assert on_ranks(2, rank_troubles.ends_between, False) == [8, 8]


def test_checksums_on_request(on_ranks):
    assert on_ranks(2, rank_troubles.in_step) == [6, 6]
    for end in on_ranks(2, rank_troubles.out_of_step):
        assert isinstance(end, Failed)
        assert (end.kind, "not in step" in end.text) == ("RankError", True)


def test_one_buffer_for_each_meta_iteration(on_ranks):
    """3 → 4 → 2: 26 parameters; 5 × 2 losses and 5 weights; counts, failures and checksums of 2
    ranks; three flags.

    Adam adds two moments for each parameter and four counts, for each of its tensors one. Each is
    reduced twice: in the meta-iteration, and to part.
    """
    figures = 10 + 5 + 2 + 2 + 6 + 3
    for sizes in on_ranks(2, rank_runs.bytes_sent):
        assert sizes == 2 * [4 * (26 + figures)] + 2 * [4 * (3 * 26 + 4 + figures)]


def test_evaluation_needs_no_other_rank(on_ranks):
    assert on_ranks(2, rank_runs.evaluates_alone) == [8, 8]


def test_more_ranks_than_tasks(on_ranks):
    for end in on_ranks(4, rank_runs.one_by_one, "plain", {"meta_batch_size": 3}):
        assert end.kind == "ConfigurationError"
        assert "meta_batch_size = 3 on 4 ranks" in end.text


def test_wrapped_models_are_refused(on_ranks):
    for wrapped in on_ranks(2, rank_runs.wrapped):
        assert "the model is wrapped" in wrapped


@pytest.mark.slow
def test_rank_that_dies(on_ranks, tmp_path):
    """kill -9 on one of torchrun's processes, whose script knows nothing of ranks."""
    script = Path(mortal_run.__file__)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, "-m", *command, script, tmp_path, "1", "17"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "rank 0 cannot reach the others" in done.stderr
    assert "rank 1 has ended; φ is as it was before" in done.stderr
    whole, _ = on_ranks(2, mortal_run.train)
    newest = tmp_path / "iteration-000000040.safetensors"
    koi = Koi.load(newest, mortal_run.make()[0].model)
    assert_close(koi.model.state_dict(), whole, tolerance=0)
    assert_close(whole, mortal_run.train(0), tolerance=1e-6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(40))
