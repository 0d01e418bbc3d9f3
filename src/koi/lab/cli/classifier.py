"""``koi adapt`` and ``predict``: a run's network, adapted to a few images of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from koi.errors import DataError, printable
from koi.fewshot.images import IMAGE_SUFFIXES, Unread
from koi.fewshot.sources import walked
from koi.lab import runs
from koi.lab.cli.fewshot import RunFolder
from koi.lab.runs import Classifier, Run


def adapt(
    run: RunFolder,
    support_folder: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="A folder of images for each class to be told."
        ),
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Inner steps [default: the recipe's in its test, 50]."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="[default: RUN/adapted-SUPPORT_FOLDER.safetensors]"),
    ] = None,
) -> None:
    """Adapt a run's network to a few images of each of some classes, for koi predict.

    There can be as many classes as the run has ways, or fewer.
    """
    if out is None:
        Run(run).check_links()
    classifier = runs.adapt(Run(run), support_folder, steps)
    path = out or run / f"adapted-{support_folder.resolve().name}.safetensors"
    classifier.save(path)
    typer.echo(
        f"Adapted to {len(classifier.support)} images of {len(classifier.classes)} classes "
        f"({', '.join(map(printable, classifier.classes))})\nClassifier: {printable(str(path))}"
    )


def predict(
    adapted: Annotated[
        Path, typer.Argument(metavar="ADAPTED", help="A file that koi adapt wrote.")
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE…", help="Images, and folders of images however deep."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each image, with all classes.")
    ] = False,
) -> None:
    """Print each image's class and its probability.

    What is said of an image does not depend on the others. One that cannot be read is named at
    the end.
    """
    classifier = Classifier.load(adapted)
    paths = [path for given in images for path in _files(given)]
    width = max(len(printable(str(path))) for path in paths)
    unread = Unread()
    for path in paths:
        image = unread.tried(classifier.image_form.read, path)
        if image is None:
            continue
        found = classifier.probabilities(image.unsqueeze(0))[0].tolist()
        probabilities = dict(zip(classifier.classes, found, strict=True))
        typer.echo(_line(path, probabilities, width, as_json))
    unread.say()


def _files(given: Path) -> Iterator[Path]:
    """Yield an image, or those in a folder.

    Raises:
        DataError: the folder has none, or a folder in it cannot be read.
    """
    if not given.is_dir():
        yield given
        return
    paths = (Path(place, name) for place, _, files in walked(given) for name in files)
    found = [
        path
        for path in sorted(paths)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"the folder {given} has no images: give one that has some")
    yield from found


def _line(path: Path, probabilities: dict[str, float], width: int, as_json: bool) -> str:
    name, probability = max(probabilities.items(), key=lambda item: item[1])
    if as_json:
        line = {"file": str(path), "class": name, "probability": probability}
        text = json.dumps({**line, "probabilities": probabilities}, ensure_ascii=False)
        # what a terminal would obey, as JSON writes it too
        return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return f"{printable(str(path)):<{width}}  {probability:6.1%}  {printable(name)}"
