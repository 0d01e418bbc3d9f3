"""What goes wrong on one of the ranks of a sharded φ ends on all in one sentence, φ whole."""

import shutil

import pytest

import sharded_troubles
from test_sharded import assert_close, one_thread  # noqa: F401 (a fixture)

FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "sha256.json"]


@pytest.fixture(scope="module")
def untroubled(on_ranks):
    """φ of two ranks to which nothing happens."""
    return on_ranks(2, sharded_troubles.given_alone, [{"folder": None}] * 2)[0].phi


def assert_goes_on(ended, again, iteration, untroubled):
    """All have stopped at the same φ, that of the last meta-iteration, and go on from it."""
    for end, went_on in zip(ended, again, strict=True):
        assert end.iteration == iteration
        assert_close(end.phi, end.seen, tolerance=0)
        assert_close(end.phi, ended[0].phi, tolerance=0)
        assert went_on.error == "NoneType"
        assert_close(went_on.phi, untroubled, tolerance=0)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("trouble", "own", "others", "text", "iteration"),
    [
        ("raises", "ValueError", "RankError", "no luck", 2),
        ("Ctrl-C", "KeyboardInterrupt", "RankError", "", 2),
        ("SIGTERM", "SystemExit", "SystemExit", "143", 3),  # all finish one more
    ],
)
def test_callback(trouble, own, others, text, iteration, victim, on_ranks, untroubled, tmp_path):
    """Each waited for the other until the process group's timeout, half an hour."""
    found = on_ranks(2, sharded_troubles.in_a_callback, trouble, victim, tmp_path, patience=30)
    ended, again = zip(*found, strict=True)
    for rank, end in enumerate(ended):
        assert end.error == (own if rank == victim else others)
        assert text in end.text
        assert trouble == "SIGTERM" or f"rank {victim}" in end.text
    assert_goes_on(ended, again, iteration, untroubled)


@pytest.mark.parametrize("victim", [0, 1])
def test_evaluation_on_one_rank_alone(victim, on_ranks, untroubled, tmp_path):
    found = on_ranks(2, sharded_troubles.evaluates_alone, victim, tmp_path, patience=30)
    ended, again = zip(*found, strict=True)
    for end in ended:
        assert end.error == "RankError"
        assert "call koi.evaluate and koi.measure on all of them" in end.text
        assert f"on rank {victim}" in end.text
    assert_goes_on(ended, again, 2, untroubled)


@pytest.mark.parametrize(
    ("trouble", "own", "others"),
    [("NaN", "NonFiniteError", "NonFiniteError"), ("Ctrl-C", "KeyboardInterrupt", "RankError")],
)
def test_loss(trouble, own, others, on_ranks, untroubled, tmp_path):
    found = on_ranks(2, sharded_troubles.in_a_loss, trouble, 1, tmp_path, patience=30)
    ended, again = zip(*found, strict=True)
    assert [end.error for end in ended] == [others, own]
    assert_goes_on(ended, again, 2 + (trouble == "Ctrl-C"), untroubled)


@pytest.mark.parametrize(
    ("of_rank_1", "error", "text"),
    [
        ({"folder": "b"}, "CheckpointError", "is not one folder in which all ranks can save"),
        ({"folder": "file"}, "CheckpointError", "file is not one folder in which all ranks can"),
        ({"folder": None}, "ConfigurationError", "checkpoint_dir: given on rank 0, None on rank 1"),
        ({"every": 2}, "ConfigurationError", "checkpoint_every: 1 on rank 0, 2 on rank 1"),
        ({"resume": False}, "ConfigurationError", "resume: True on rank 0, False on rank 1"),
        ({"step_size": 0.1}, "ConfigurationError", "step_size: 0.05 on rank 0, 0.1 on rank 1"),
    ],
)
def test_what_one_rank_was_given(of_rank_1, error, text, on_ranks, tmp_path):
    """With a folder of its own each rank said that all was saved, and nowhere was it whole."""
    (tmp_path / "b").mkdir()
    (tmp_path / "file").touch()
    options = [{"folder": "a"}, {"folder": "a", **of_rank_1}]
    for each in options:
        each["folder"] = each["folder"] and tmp_path / each["folder"]
    for end in on_ranks(2, sharded_troubles.given_alone, options, patience=30):
        assert (end.error, end.iteration) == (error, 0)
        assert text in end.text
    left = [path.name for path in tmp_path.rglob("*") if path.name not in ("a", "b", "file")]
    assert left == []


def test_what_a_rank_wrote_is_not_there(on_ranks, tmp_path):
    for end in on_ranks(2, sharded_troubles.loses_what_a_rank_wrote, tmp_path, patience=30):
        assert (end.error, end.iteration) == ("CheckpointError", 1)
        assert "cannot be written (OSError: __1_0.distcp of other ranks are not in this" in end.text
    assert not list(tmp_path.glob("*.shards"))


@pytest.mark.filterwarnings("ignore::koi.KoiWarning")
def test_damaged_files(on_ranks, untroubled, tmp_path):
    """One bit in any of them: all ranks take the checkpoint before; damage to all is an error."""
    constant = {"num_iterations": 5}
    whole = on_ranks(2, sharded_troubles.given_alone, [{"folder": None, **constant}] * 2)[0]
    on_ranks(2, sharded_troubles.given_alone, [{"folder": tmp_path / "made"}] * 2)
    for number, name in enumerate(FILES):
        folder = shutil.copytree(tmp_path / "made", tmp_path / str(number))
        for end in on_ranks(2, sharded_troubles.damaged, folder, name, patience=30):
            assert (end.error, end.iteration) == ("NoneType", 5), end.text
            assert_close(end.phi, whole.phi, tolerance=0)
    for end in on_ranks(2, sharded_troubles.damaged, folder, None, patience=30):
        assert (end.error, end.iteration) == ("CheckpointError", 0)
        assert "none of the 2 checkpoints in" in end.text


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("layer", "ModelError", "has sharded parameters (0.weight, 0.bias): Koi trains what"),
        ("layers", "ConfigurationError", "of the whole on rank 0, in shards, by fully_shard of th"),
        ("rank", "ConfigurationError", "model: whole on rank 0, in shards, by fully_shard of the"),
        ("shape", "ConfigurationError", "shape of 0.bias: (5,) on rank 0, None on rank 1"),
    ],
)
def test_model_that_is_sharded_in_part(what, error, text, on_ranks):
    for kind, said in on_ranks(2, sharded_troubles.unlike, what, patience=30):
        assert kind == error
        assert text in said


def test_folder_of_another_kind_of_model(on_ranks, tmp_path):
    """It began anew, and left what was there."""
    for found in on_ranks(2, sharded_troubles.of_another_kind, tmp_path / "run", patience=30):
        assert ["holds checkpoints of a model that is sharded, and this" in found[0]] == [True]
        assert "holds checkpoints of a model that is whole, and this one is sharded" in found[1]
