"""``koi recipes``, ``train``, ``evaluate`` and ``table``: few-shot experiments in run folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from koi import plots
from koi.errors import ConfigurationError, printable
from koi.lab import runs
from koi.lab.runs import Config, Run
from koi.recipes import IMAGE_FORMS, RECIPES, FewShotRecipe, Parts, own_folder, recipe_named

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that koi train made.")]
_OWN = "Your own folder (--data FOLDER, and no recipe)"


def _not_one(num_tasks: int) -> int:
    if num_tasks == 1:
        raise typer.BadParameter("one task has no interval: take 2 or more, or 0 not to measure")
    return num_tasks


TestTasks = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Test tasks to measure on; the paper: 10000.", callback=_not_one
    ),
]


def recipes() -> None:
    """List the paper's few-shot experiments, which koi train runs."""
    table = Table()
    table.add_column("recipe", no_wrap=True)
    for title in ("shots", "steps", "batch", "rate", "meta-iterations"):
        table.add_column(title, justify="right")
    for recipe in RECIPES.values():
        table.add_row(
            recipe.name,
            f"{recipe.num_shots}",
            f"{recipe.num_steps}",
            f"{recipe.batch_size}",
            f"{recipe.step_size:g}",
            f"{recipe.num_iterations:,}",
        )
    Console(highlight=False).print(table)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="One of those that koi recipes lists; or give --data alone."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Meta-iterations, ε falling to 0 over them [default: the recipe's; for a folder "
            "of your own at most 10000].",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="The run's folder [default: runs/, and RECIPE or FOLDER]."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Where the recipe's data are; Omniglot is downloaded without it. With no recipe: "
            "a folder of your own, with a folder of images for each class.",
        ),
    ] = None,
    ways: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Classes to tell apart [default: 5].", rich_help_panel=_OWN
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Images of each class to adapt to in the test [default: 1].",
            rich_help_panel=_OWN,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="omniglot sees images as 28 × 28 pixels in grey; mini-imagenet as 84 × 84 in "
            "colour, and takes some 20 times as long [default: omniglot].",
            rich_help_panel=_OWN,
        ),
    ] = None,
    test_tasks: TestTasks = 1000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of weights and tasks.")] = 0,
    validation: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Training characters of Omniglot that are set apart to watch the training by; the "
            "paper: 0.",
        ),
    ] = 100,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the inner loop: pays on long runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train an experiment of the paper, or the like on your own images, and measure it.

    An experiment is set beside the paper's numbers. For your own images (--data FOLDER and no
    recipe) settings are those of the recipe with the same network and the nearest number of ways,
    of our own if there is one. A fifth of the classes is kept for the test, and a fifth
    for validation if there are enough. Training ends after 10,000 meta-iterations, or when 6
    validations in a row, one every 500, were no better than the best before them; the best weights
    are kept. With --iterations it takes that many.

    The same command again goes on with a run that was stopped.
    """
    own = {"num_ways": ways, "num_shots": shots, "network": network}
    _check_device(device)
    chosen, classes = _experiment(recipe, data, seed, own)
    if iterations is not None:
        chosen = replace(chosen, num_iterations=iterations, patience=None)
    config = Config(
        chosen,
        data=None if data is None else str(data.resolve()),
        seed=seed,
        num_validation=validation,
        compile=compile,
        device=device,
        classes=classes,
    )
    run = Run.begun(out or Path("runs") / (recipe or Path(str(config.data)).name), config)
    console = _console()
    console.print(
        f"{chosen.name}: {chosen.num_iterations:,} meta-iterations in {_shown(run.folder)}"
    )
    if classes is not None:
        console.print(_description(chosen, classes), soft_wrap=True)
    learner = runs.train(run, say=tqdm.write)
    if learner.best is not None and chosen.problem == "folder":
        found = f"{100 * (1 - learner.best.value):.1f} % of validation queries are told rightly"
        console.print(
            f"The weights kept are those after {learner.best.iteration:,} of "
            f"{learner.iteration:,} meta-iterations, where {found}"
        )
    if test_tasks:
        _measure(run, list(chosen.adaptations), test_tasks, console, compile=compile)


def evaluate(
    run: RunFolder,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="K …", help="Support examples of each class."),
    ] = None,
    more_shots: Annotated[list[int] | None, typer.Argument(min=1, hidden=True)] = None,
    tasks: Annotated[
        int, typer.Option(min=2, metavar="N", help="Test tasks to measure on; the paper: 10000.")
    ] = 1000,
) -> None:
    """Measure a run on its test classes, both ways, and keep the result in its folder."""
    opened = Run(run)
    wanted = [*(shots or []), *(more_shots or [])]  # an option takes one value: `--shots 1 5`
    default = list(opened.config().recipe.adaptations)
    _measure(opened, wanted or default, tasks, _console())


def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders that koi train made.")
    ],
) -> None:
    """Print the results of runs beside the paper's; into a pipe, as a table in Markdown."""
    opened = [Run(folder) for folder in folders]
    measured = [run for run in opened if run.results()]
    if measured:
        _print_table(measured, _console())
    runs.check_measured(opened)


def export(
    run: RunFolder, file: Annotated[Path, typer.Argument(help="Where to write the learner.")]
) -> None:
    """Write a run's learner as one small file, which Koi.load and koi demo read."""
    runs.export(Run(run), file)
    typer.echo(f"{_shown(file)}: {file.stat().st_size:,} bytes")


def _console() -> Console:
    """Return a console that takes what it is given as it is: names of folders can hold marks."""
    return Console(highlight=False, markup=False, emoji=False)


def _shown(path: Path) -> str:
    return printable(str(path))


def _measure(
    run: Run, shots: list[int], num_tasks: int, console: Console, *, compile: bool = False
) -> None:
    console.print(f"Adapting to {num_tasks:,} test tasks")
    for num_shots in shots:
        runs.measure(run, num_shots, num_tasks, compile=compile)
    plots.save(plots.learning_curve(run.validations(), run.results()), run.picture)
    runs.write_card(run)
    _print_table([run], console)
    console.print(f"Picture: {_shown(run.picture)}", soft_wrap=True)


def _print_table(measured: list[Run], console: Console) -> None:
    """Print a table for people on a terminal, Markdown into a pipe."""
    if not console.is_terminal:
        typer.echo(runs.markdown_table(measured))
        return
    table, found = Table(), runs.columns(measured)
    for is_number, name, _ in found:
        table.add_column(name, justify="right" if is_number else "left")
    for row in zip(*(cells for _, _, cells in found), strict=True):
        table.add_row(*(printable(cell) for cell in row))
    console.print(table)


def _check_device(device: str) -> None:
    """Check that tensors can be made there, before anything else is done."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0].split(" device type")[0]
        raise typer.BadParameter(
            f"{device} cannot be used here ({why}): take cpu", param_hint="--device"
        ) from error


def _experiment(
    recipe: str | None, data: Path | None, seed: int, own: dict[str, Any]
) -> tuple[FewShotRecipe, Parts | None]:
    """Return what is to be trained, and of a folder of one's own the classes of each part."""
    given = {name: value for name, value in own.items() if value is not None}
    if recipe is not None and given:
        names = ", ".join(f"--{name.removeprefix('num_')}" for name in given)
        raise ConfigurationError(
            [f"{names}: the recipe {recipe} has its own; leave out the one or the other"]
        )
    if recipe is not None:
        return recipe_named(recipe), None
    if data is None:
        raise ConfigurationError(
            [
                "what to train? Give one of the recipes that koi recipes lists, or --data FOLDER, "
                "a folder of images for each class"
            ]
        )
    return own_folder(data, **given, seed=seed)


def _description(recipe: FewShotRecipe, classes: Parts) -> str:
    form = IMAGE_FORMS[recipe.network]
    sizes = ", ".join(f"{len(names)} for {part}" for part, names in classes.items())
    return (
        f"Classes: {sizes}. Images: {form.size} × {form.size} pixels, "
        f"{'grey' if form.mode == 'L' else 'in colour'}, in a training task {recipe.num_shots} of "
        f"each class to adapt to and {recipe.num_queries} to be asked"
    )
