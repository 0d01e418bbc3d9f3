"""The numbers that the pages promise are those of the code."""

import inspect
from pathlib import Path

import pytest
from torch.distributed.distributed_c10d import default_pg_timeout

from koi import Koi, records, storage
from koi.lab.demo import guards, server, strokes
from koi.ranks import presence
from koi.training import ahead, folder, frozen, logs, past

SHIPPED = storage.read(Path(strokes.__file__).with_name("omniglot-5way-koi.safetensors"))
how = tuple(SHIPPED["settings"][n] for n in ("algorithm", "inner_optimizer", "learn_step_size"))
rate = SHIPPED["settings"]["step_size"]
DOCS = Path(__file__).parent.parent / "docs"
every = inspect.signature(Koi.train).parameters["validate_every"].default


@pytest.mark.parametrize(
    ("page", "words", "there", "number"),
    [
        ("long-runs", "and the last two are kept", folder._KEPT, 2),
        ("long-runs", "its last one or two thousand records", past._BLOCK, 1000),
        ("long-runs", "every thousand meta-iterations", past._BLOCK, 1000),
        ("long-runs", "72 bytes a record", records.ROW, 72),
        ("long-runs", "nine numbers a record", len(records.COLUMNS), 9),
        ("long-runs", "and at 1,024 of its values", frozen._SAMPLE, 1024),
        ("long-runs", "Lines reach the file every five seconds", logs._PATIENCE, 5),
        ("long-runs", "Of more than 1,000 meta-iterations it gets means", logs._POINTS, 1000),
        ("long-runs", "twelve levels of attributes and containers", ahead._DEEPEST, 12),
        ("long-runs", "of more than a thousand entries", ahead._SOME, 1024),
        ("long-runs", "of more than a megabyte a part", ahead._SMALL, 2**20),
        ("long-runs", "20,000 of them in all", ahead._MOST, 20_000),
        ("long-runs", "Every 500 meta-iterations (`validate_every`)", every, 500),
        ("long-runs", "an error within a minute that names it", presence._SECONDS, 60),
        ("long-runs", "is 30 minutes with gloo", default_pg_timeout.total_seconds(), 1800),
        ("demo", "no whole request in 5 seconds", guards.HEAD_SECONDS, 5),
        ("demo", "no whole question in 10 more", guards.BODY_SECONDS, 10),
        ("demo", "Ctrl-C waits a second", server._PATIENCE, 1),
        ("demo", "(68 of 105 pixels)", (strokes._EXTENT, strokes._BOX), (68, 105)),
        ("demo", "(5.2 pixels wide", 2 * strokes._PEN_RADIUS, 5.2),
        ("demo", "learned in 30,000 meta-iterations", SHIPPED["iteration"], 30_000),
        ("demo", "MAML, whose inner steps are SGD with a", how, ("maml", "sgd", "layer")),
        ("demo", "began with, 0.4 in all layers", rate, 0.4),
    ],
)
def test_promised(page, words, there, number):
    assert words in " ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split())
    assert there == number
