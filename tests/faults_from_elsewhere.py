"""Faults that come from elsewhere: wrong arguments, forged and fuzzed files. Rows of faults.py."""

import copy
import json
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from matplotlib import pyplot

import forgeries
from faults_in_data import fuzzed
from koi import Koi, KoiError, KoiWarning, plots, storage
from koi.lab import runs
from koi.lab.runs import Classifier, Config, Run
from koi.recipes import RECIPES
from public_calls import PLACES, WRONG, elsewhere, raw
from toys import small_net

_draw = random.SystemRandom()
_VALUES = [None, True, -1, 0.5, 2**70, float("nan"), "x", "\x1b[31m", b"x", [], {}, (1,), 5_000_000]


def wrong_arguments(times: int) -> int:
    """A wrong value for any argument of any public callable: it works, or Koi says why not."""
    lost = 0
    for _ in range(times):
        with elsewhere():
            lost += raw(_draw.choice(PLACES), _draw.choice(WRONG)) is not None
    return lost


def _changed(data, depth: int = 4):
    """Return data with one part, somewhere, in the place of another."""
    if depth and isinstance(data, dict) and data and _draw.random() < 0.9:
        name = _draw.choice([*data])
        return {**data, name: _changed(data[name], depth - 1)}
    if depth and isinstance(data, list | tuple) and data and _draw.random() < 0.9:
        place = _draw.randrange(len(data))
        parts = [*data]
        parts[place] = _changed(parts[place], depth - 1)
        return type(data)(parts)
    return _draw.choice([*_VALUES, torch.zeros(3), torch.zeros(2, 10**4)])


def _refused_or_right(use) -> int:
    """Return 1 where something else came than a success or an answer of Koi's."""
    try:
        use()
    except KoiError:
        return 0
    except Exception:
        return 1
    return 0


def forged_classifiers(times: int) -> int:
    """A classifier's file with a right checksum, in which something else stands."""
    support = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    model = RECIPES["omniglot-5way"].model()
    with tempfile.TemporaryDirectory() as folder:
        path, lost = Path(folder, "file"), 0
        Classifier("omniglot", ("a", "b"), model, support).save(path)
        whole = storage.read(path)
        for _ in range(times):
            changed = _changed(whole)
            storage.write(path, changed if isinstance(changed, dict) else {"it": 0})
            lost += _refused_or_right(lambda: Classifier.load(path).probabilities(support))
        return lost


def edited_runs(times: int) -> int:
    """config.json or results.json of a run, edited anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.begun(Path(folder, "run"), Config(RECIPES["omniglot-5way"]))
        result = {"transductive": [0.9, 0.1], "inductive": [0.8, 0.1], "num_tasks": 3}
        run.add_result(1, {**result, "iteration": 0})
        files = [run.folder / name for name in ("config.json", "results.json")]
        whole = {path: json.loads(path.read_text()) for path in files}
        lost = 0
        for _ in range(times):
            path = _draw.choice(files)
            text = json.dumps(_changed(copy.deepcopy(whole[path])), default=str)
            path.write_text(text)
            lost += _refused_or_right(lambda: (run.environment(), runs.markdown_table([run])))
            path.write_text(json.dumps(whole[path]))
        return lost


def edited_lines(times: int) -> int:
    """validation.jsonl of a run, a line of it edited anywhere or cut, or bytes of it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.begun(Path(folder, "run"), Config(RECIPES["omniglot-5way"]))
        line = {"iteration": 250, "1-shot inductive": 0.5, "1-shot num_skipped": 0}
        whole = [json.dumps({**line, "iteration": 250 * n}).encode() for n in range(1, 4)]
        lost = 0
        for _ in range(times):
            lines = [*whole]
            place = _draw.randrange(3)
            changed = json.dumps(_changed(copy.deepcopy(line)), default=str).encode()
            lines[place] = _draw.choice((changed, fuzzed(whole[place])))
            run.validation.write_bytes(b"\n".join(lines) + b"\n")
            lost += _refused_or_right(
                lambda: plots.learning_curve(run.validations(), {}) and pyplot.close()
            )
        return lost


def forged_checkpoints(times: int) -> int:
    """A checkpoint with a right checksum, and something else in it, of every kind of learner."""
    lost, kinds = 0, [*forgeries.LEARNERS.values()]
    logging.getLogger("koi").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", KoiWarning)
        path = Path(name, "forged.safetensors")
        whole = [forgeries.checkpoint_of(kind, Path(name, str(i))) for i, kind in enumerate(kinds)]
        for number in range(times):
            kind, data = kinds[number % len(kinds)], whole[number % len(kinds)]
            where = _draw.choice([*forgeries.places(data)])
            value = _draw.choice([*forgeries.instead_of(forgeries.at(data, where))])
            changed = forgeries.edited(data, where, value)
            said = forgeries.answer(kind, path, changed)
            if said is not None:
                lost += 1
                print(f"{value!r} at {where}: {said}", file=sys.stderr)
    logging.getLogger("koi").setLevel(logging.NOTSET)
    return lost


def fuzzed_files(times: int) -> int:
    """A checkpoint and a run's files with any bytes in the place of some."""
    with tempfile.TemporaryDirectory() as folder:
        path, lost = Path(folder, "koi.safetensors"), 0
        Koi(small_net(), num_iterations=2).save(path)
        content = path.read_bytes()
        for _ in range(times):
            place, length = _draw.randrange(len(content)), _draw.randrange(1, 64)
            changed = content[:place] + _draw.randbytes(length) + content[place + length :]
            path.write_bytes(changed)
            lost += changed != content and not _refused(path)
        return lost


def _refused(path: Path) -> bool:
    try:
        Koi.load(path, small_net())
    except KoiError:
        return True
    return False
