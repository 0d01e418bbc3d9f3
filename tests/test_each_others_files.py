"""Each command on what the others write: what it is, what is wanted, and how to get that."""

import pytest

from koi.lab.markdown import text
from koi.lab.runs import Run
from koi.lab.runs.measuring import newest_checkpoint


@pytest.fixture
def files(own_run):
    place, run, classifier = own_run
    (place / "folder").mkdir(exist_ok=True)
    (place / "text").write_text("no file of Koi's")
    return {
        "run": run,
        "checkpoint": newest_checkpoint(Run(run)),
        "learner": run / "learner.safetensors",
        "weights": run / "model.safetensors",
        "classifier": classifier,
        "image": place / "new" / "bar" / "0.png",
        "folder": place / "folder",
        "text": place / "text",
        "nothing": place / "nothing",
    }


KINDS = {
    "run": "is the folder of a run",
    "checkpoint": "is a learner, as checkpoints are and what koi export writes",
    "learner": "is a learner, as checkpoints are and what koi export writes",
    "weights": "is a file of plain weights",
    "classifier": "is a classifier, which koi adapt wrote",
    "image": "is an image",
    "folder": "is a folder without a run",
    "text": "is no file of Koi's, or damaged",
    "nothing": "is not there",
}


@pytest.mark.parametrize(
    ("command", "rightly", "wanted"),
    [
        (["evaluate"], ["run"], "give the folder of a run, which koi train makes"),
        (["table"], ["run"], "give the folder of a run, which koi train makes"),
        (["export", None, "out"], ["run"], "give the folder of a run, which koi train makes"),
        (["adapt", None, "support"], ["run"], "give the folder of a run, which koi train mak"),
        (["predict", None, "new"], ["classifier"], "give a file that koi adapt wrote"),
        (
            ["demo", "--no-open", "--checkpoint"],
            ["run", "checkpoint", "learner"],
            "give the folder of a run, a checkpoint in it, or what koi export wrote",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_given_and_what_is_wanted(
    files, own_run, koi, monkeypatch, command, rightly, wanted
):
    monkeypatch.chdir(own_run.place)
    for kind, path in files.items():
        if kind in rightly:
            continue
        words = [path if word is None else word for word in command]
        code, stdout, stderr = koi(*words, *([] if None in command else [path]))
        end = f"adapt it first, by koi adapt {path} SUPPORT_FOLDER"
        end = end if kind == "run" and command[0] == "predict" else wanted
        if kind == "folder":
            end = "give the folder of a run, which koi train makes"
            end = wanted if command[0] == "predict" else end
        assert (code, stdout) == (2, "")
        assert stderr.startswith(f"koi: {path} {KINDS[kind]}: {end}"), stderr
        assert len(stderr.splitlines()) == 1
    assert not (own_run.place / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "run", "missing/folder/x"], "(No such file or directory): φ and earlier"),
        (["export", "run", "missing/folder/x"], "; make its folder, or choose another"),
        (["export", "run", "new"], "(Is a directory): φ and earlier"),
        (["adapt", "run", "support", "--out", "text/x"], "what should be its folder is a file"),
        (["train", "--data", "shapes", "--ways", "3", "--out", "text"], "a file of that name"),
        (
            ["train", "--data", "shapes", "--ways", "3", "--out", "text/x"],
            "should be its folder",
        ),
        (["evaluate", "run", "--shots", "20", "--tasks", "2"], "has 4: take 3 or fewer"),
        (["evaluate", "run", "--tasks", "0"], "--tasks"),
        (["train", "mini-imagenet-5way", "--out", "mini"], "give them by --data"),
    ],
)
def test_what_cannot_be_done_has_a_mend(files, own_run, koi, monkeypatch, words, said):
    monkeypatch.chdir(own_run.place)
    code, _, stderr = koi(*words)
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_a_run_without_a_result_is_named_after_the_others(files, own_run, koi):
    place, trained, _ = own_run
    bare = place / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "config.json").write_bytes((trained / "config.json").read_bytes())
    code, stdout, stderr = koi("table", bare, trained)
    assert code == 2
    assert stdout.splitlines()[2].startswith(f"| {text(trained)} | folder-3way | 5 | 1 | 4 |")
    assert "–" not in stdout
    assert stderr == f"koi: {bare} has no result yet: measure it by koi evaluate {bare}\n"


def test_on_a_terminal_a_table_is_for_people(own_run, koi, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, stdout, _ = koi("table", own_run.run)
    assert code == 0
    assert "┃" in stdout
    assert "the paper" not in stdout
