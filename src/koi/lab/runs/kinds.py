"""What a file or folder is, to be said to whoever gave it in the place of another."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from koi import storage
from koi.errors import CheckpointError
from koi.fewshot.images import IMAGE_SUFFIXES

CONFIG = "config.json"
RUN = "the folder of a run"
CLASSIFIER = "a classifier, which koi adapt wrote"
LEARNER = "a learner, as checkpoints are and what koi export writes"


def what_is(path: Path) -> str:
    """Return what there is under a path, as the end of a sentence "PATH is …".

    >>> what_is(Path("nowhere"))
    'not there'
    """
    if path.is_dir():
        return RUN if (path / CONFIG).is_file() else "a folder without a run"
    if not path.is_file():
        return "no plain file" if path.exists() else "not there"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "an image"
    try:
        data = storage.read(path)
    except CheckpointError:
        return "a file of plain weights" if _is_plain(path) else "no file of Koi's, or damaged"
    if "classifier" in data:
        return CLASSIFIER
    return LEARNER


def _is_plain(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "koi" not in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
