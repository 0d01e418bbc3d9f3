"""What is in a checkpoint's folder is gone on from, left alone, or refused; never lost."""

import warnings

import pytest

from koi import CheckpointError, ConfigurationError, Koi, KoiWarning
from resume_toys import (
    Lines,
    Stateful,
    Stop,
    assert_same_training,
    learner,
    net,
    reseed,
    stops_after,
    uninterrupted,
)
from toys import Regressions, assert_same, small_net, snapshot


def test_nothing_to_resume_starts_from_the_beginning(tmp_path):
    whole = uninterrupted({}, False)
    reseed(1)
    koi = learner(net(), {}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path / "new" / "folder", resume=True)
    assert_same_training(koi, whole)


def test_finished_training_is_not_trained_on(tmp_path):
    koi = learner(net(), {}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    other = learner(net(), {}, False)
    other.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(other, koi)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("constant", [{"meta_step_size": 0.05}, {"algorithm": "fomaml"}])
def test_more_iterations_where_epsilon_is_constant(tmp_path, constant):
    whole = uninterrupted(constant | {"num_iterations": 9}, False)
    reseed(1)
    short = learner(net(), constant | {"num_iterations": 4}, False)
    short.train(Stateful(), checkpoint_dir=tmp_path)
    koi = learner(net(), constant | {"num_iterations": 9}, False)
    koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert_same_training(koi, whole)


def test_no_more_iterations_where_the_default_falls_over_them(tmp_path):
    learner(net(), {"num_iterations": 2}, False).train(Stateful(), checkpoint_dir=tmp_path)
    same = learner(net(), {"num_iterations": 2}, False)
    same.train(Stateful(), checkpoint_dir=tmp_path, resume=True)
    assert same.iteration == 2
    koi = learner(net(), {"num_iterations": 3}, False)
    with pytest.raises(CheckpointError, match="num_iterations: 2 in the checkpoint, 3 here"):
        koi.train(Stateful(), checkpoint_dir=tmp_path, resume=True)


def test_damaged_newest_gives_way_to_the_one_before(tmp_path):
    whole = uninterrupted({}, False)
    reseed(1)
    with pytest.raises(Stop):
        learner(net(), {}, False).train(
            Stateful(), callbacks=[stops_after(5)], checkpoint_dir=tmp_path, checkpoint_every=2
        )
    newest = tmp_path / "iteration-000000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    koi = learner(net(), {}, False)
    with pytest.warns(KoiWarning, match=r"000005\.safetensors is damaged"):
        koi.train(Stateful(), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert_same_training(koi, whole)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    (tmp_path / "iteration-000000005.safetensors").write_bytes(b"")
    with (
        pytest.warns(KoiWarning, match="iteration-000000005"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints"),
    ):
        learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path, resume=True)


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "iteration-5.txt").write_text("mine")
    (tmp_path / ".iteration-000000003.safetensors.1.tmp").write_text("of a killed process")
    learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-000000006.safetensors",
        "iteration-000000007.safetensors",
        "iteration-5.txt",
        "notes.txt",
    ]


def test_earlier_training_is_not_overwritten(tmp_path):
    learner(net(), {}, False).train(Stateful(), checkpoint_dir=tmp_path)
    model = net()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="resume=True"):
        learner(model, {}, False).train(Stateful(), checkpoint_dir=tmp_path)
    assert_same(model, before)
    assert len(list(tmp_path.iterdir())) == 1


def test_training_on_in_the_same_process(tmp_path):
    """The learner knows where it is: what it wrote itself is no earlier training."""
    koi = learner(small_net(), {}, False)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(3)], checkpoint_dir=tmp_path)
    koi.train(Lines(), checkpoint_dir=tmp_path)
    assert koi.iteration == 7
    assert len(list(tmp_path.iterdir())) == 2


def test_learner_that_is_ahead_is_not_set_back(tmp_path):
    koi = learner(net(), {}, False)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(2)], checkpoint_dir=tmp_path)
    with pytest.raises(Stop):
        koi.train(Lines(), callbacks=[stops_after(5)])
    koi.train(Lines(), checkpoint_dir=tmp_path, resume=True)
    assert [record.iteration for record in koi.history] == list(range(7))


@pytest.mark.parametrize(
    "arguments", [{"resume": True}, {"checkpoint_every": 3}, {"checkpoint_every": 0}]
)
def test_arguments_that_make_no_sense(arguments, tmp_path):
    if arguments == {"checkpoint_every": 0}:
        arguments = {"checkpoint_every": 0, "checkpoint_dir": tmp_path}
    with pytest.raises(ConfigurationError, match=r"checkpoint_dir|checkpoint_every = 0"):
        learner(net(), {}, False).train(Lines(), **arguments)


NAMES = ["history.f64", "best.safetensors", "begun.jsonl", "iteration-000000002.safetensors"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["", "precious", None])
def test_nothing_is_written_through_a_link(name, content, tmp_path):
    """To a file that has nothing in it yet, or is not there, neither."""
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    constant = {"meta_step_size": 0.5, "seed": 0}
    Koi(small_net(), num_iterations=1, **constant).train(Regressions(), checkpoint_dir=folder)
    if content is not None:
        precious.write_text(content)
    (folder / name).symlink_to(precious)
    koi = Koi(small_net(), num_iterations=2, **constant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoiWarning)  # of a checkpoint that cannot be read
        with pytest.raises(CheckpointError, match=f"{name} is a link, and Koi writes through none"):
            koi.train(Regressions(), checkpoint_dir=folder, resume=True)
    assert (precious.read_text() if precious.exists() else None) == content
