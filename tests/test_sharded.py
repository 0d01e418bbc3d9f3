"""A sharded φ is learned as a whole one is, on task groups × shards."""

from pathlib import Path

import pytest
import torch

import sharded_runs
from koi.inner.compiled.workers import threads


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def assert_close(one, other, tolerance=1e-8):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_same_as_one_process(size, on_ranks):
    """1 × 2 and 2 × 2: φ, buffers, losses and norms."""
    alone = sharded_runs.trained(0, None)
    together = on_ranks(size, sharded_runs.trained, 2)
    for found in together:
        assert_close(found, alone)
        assert_close(found, together[0], tolerance=0)


@pytest.mark.parametrize("case", ["reptile with Adam", "fomaml with a meta-optimizer"])
def test_saved_on_four_ranks_and_resumed_on_two(case, on_ranks, tmp_path):
    """What is saved is what is read, bit for bit; so is the end on the same ranks."""
    whole = on_ranks(4, sharded_runs.saved, 2, 4, tmp_path / "whole", case)
    (_, *there), *_ = on_ranks(4, sharded_runs.saved, 2, 3, tmp_path / "part", case)
    names = sorted(path.name for path in (tmp_path / "part").iterdir())
    assert names == ["iteration-000000002.shards", "iteration-000000003.shards"]
    for size, shards in [(2, 2), (4, 4)]:
        found = on_ranks(size, sharded_runs.saved, shards, 3, tmp_path / "part", case)
        for iteration, *read in found:
            assert iteration == 3
            assert_close(read, there, tolerance=0)
    for size, tolerance in [(4, 0), (2, 1e-8)]:
        folder = tmp_path / f"on {size}"
        (tmp_path / "part").rename(folder)
        for end in on_ranks(size, sharded_runs.saved, 2, 4, folder, case):
            assert_close(end, whole[0], tolerance)
        folder.rename(tmp_path / "part")
        for path in (tmp_path / "part").glob("*4.shards"):
            path.rename(tmp_path / f"done on {size}")


@pytest.fixture(scope="module")
def untroubled(on_ranks):
    """φ of four ranks to which nothing happens."""
    return on_ranks(4, sharded_runs.untroubled)[0]


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ("nan", "NonFiniteError", "meta-iteration 2, task 2"),
        ("raises", "ZeroDivisionError", "division by zero"),
    ],
)
def test_loss_that_goes_wrong(wrong, kind, text, on_ranks, untroubled, tmp_path):
    """All stop at the same φ, which is saved; the learner itself and another one go on from it."""
    ended = on_ranks(4, sharded_runs.in_trouble, wrong, tmp_path / "run")
    kinds = {end[0] for end in ended}
    assert kinds <= {kind, "RankError"}
    assert kind in kinds
    for _, said, iteration, phi, stopped, went_on, resumed in ended:
        assert text in said
        assert iteration == 2
        assert_close(stopped, phi, tolerance=0)
        assert_close(went_on, untroubled, tolerance=0)
        assert_close(resumed, untroubled, tolerance=0)


def test_loss_that_goes_wrong_on_one_rank_alone(on_ranks):
    """It leaves; the other one, in the model's own messages, hears why as these time out."""
    waiting, left = on_ranks(2, sharded_runs.alone_in_trouble, 1, patience=4)
    kind, text, iteration = left
    assert (kind, iteration) == ("ZeroDivisionError", 2)
    assert "on rank 1; rank 0 hears of it when this process ends" in text
    kind, text, iteration = waiting
    assert (kind, iteration) == ("RankError", 2)
    assert "rank 1 has stopped, φ is as it was before: ZeroDivisionError: division" in text


def test_evaluates_and_measures_in_place(on_ranks):
    losses, measured, _ = sharded_runs.adapted(0, None)
    for own_losses, own_measured, unchanged in on_ranks(4, sharded_runs.adapted, 2):
        assert_close((own_losses, own_measured), (losses, measured))
        assert unchanged


def test_a_rank_holds_its_rows_alone(on_ranks):
    """Of 5 × 3, 5, 5, 5, 2 × 5 and 2 numbers, three times with Adam."""
    rows = [3 * (3 * 3 + 3 + 3 + 3 + 5 + 1), 3 * (2 * 3 + 2 + 2 + 2 + 5 + 1)]
    assert on_ranks(2, sharded_runs.sizes, 2) == rows
    assert sum(rows) == sharded_runs.sizes(0, None)


def test_peak_memory_falls_with_the_shards(on_ranks):
    """To little more than their part: of eight equal layers one is gathered at a time."""
    alone = sharded_runs.peak(0, None)
    for size in (2, 4):
        for most in on_ranks(size, sharded_runs.peak, size):
            assert most < 1.4 * alone / size


def test_what_is_refused(on_ranks):
    for said in on_ranks(2, sharded_runs.refused):
        assert "has sharded parameters (weight): Koi trains what" in said["shards of columns"]
        lines = said["settings"].splitlines()
        wanted = ["'maml'", "vectorize=True", "clip_inner", "inner_optimizer", "Adafactor"]
        assert len(lines) == len(wanted)
        for line, word in zip(lines, wanted, strict=True):
            assert line.startswith("a sharded model does not go with ")
            assert word in line
        assert "a sharded model cannot be copied" in said["adapt"]
        assert "validate" in said["validate"]
        assert "checkpoint_dir" in said["save"]


def test_torch_itself_cannot(on_ranks):
    """So that what is refused for this reason is looked at again once torch can."""
    script = Path(__file__).parent.parent / "benchmarks" / "fsdp_limits.py"
    (text,) = on_ranks(1, sharded_runs.printed, str(script))
    copied, gradient, twice, others = text.splitlines()
    assert "FSDP does not support deepcopy" in copied
    assert "to not have been used in the graph" in gradient
    assert "does not require grad" in twice
    assert others == "other weights: 6"
