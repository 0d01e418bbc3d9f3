"""``koi recipes``, ``train``, ``evaluate`` and ``table``: few-shot experiments in run folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from koi import plots, runs
from koi.recipes import RECIPES, recipe_named
from koi.runs import Config, Run

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that koi train made.")]
TestTasks = Annotated[
    int, typer.Option(min=0, metavar="N", help="Test tasks to measure on; the paper: 10000.")
]


def recipes() -> None:
    """List the paper's few-shot experiments, which koi train runs."""
    table = Table()
    for title in ("recipe", "algorithm", "inner Adam", "inner batch", "meta-iterations"):
        table.add_column(title)
    for recipe in RECIPES.values():
        table.add_row(
            recipe.name,
            recipe.algorithm,
            f"{recipe.num_steps} steps at {recipe.step_size:g}",
            f"{recipe.batch_size} of {recipe.num_ways} × {recipe.num_shots}",
            f"{recipe.num_iterations:,}",
        )
    Console(highlight=False).print(table)


def train(
    recipe: Annotated[str, typer.Argument(help="One of those that koi recipes lists.")],
    iterations: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Meta-iterations, ε falling to 0 over them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run's folder [default: runs/RECIPE].")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, help="Where the data are; Omniglot is downloaded without it."),
    ] = None,
    test_tasks: TestTasks = 1000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of weights and tasks.")] = 0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the inner loop: pays on long runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train an experiment of the paper, measure it, and say how far from the paper it is.

    The same command again goes on with a run that was stopped.
    """
    chosen = recipe_named(recipe)
    if iterations is not None:
        chosen = replace(chosen, num_iterations=iterations)
    config = Config(
        chosen,
        data=None if data is None else str(data.resolve()),
        seed=seed,
        compile=compile,
        device=device,
    )
    run = Run.begun(out or Path("runs") / recipe, config)
    console = Console(highlight=False)
    console.print(f"{recipe}: {chosen.num_iterations:,} meta-iterations in {run.folder}")
    runs.train(run)
    if test_tasks:
        _measure(run, list(chosen.adaptations), test_tasks, console)


def evaluate(
    run: RunFolder,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="K …", help="Support examples of each class."),
    ] = None,
    more_shots: Annotated[list[int] | None, typer.Argument(min=1, hidden=True)] = None,
    tasks: TestTasks = 1000,
) -> None:
    """Measure a run on its test classes, both ways, and keep the result in its folder."""
    opened = Run(run)
    wanted = [*(shots or []), *(more_shots or [])]  # an option takes one value: `--shots 1 5`
    default = list(opened.config().recipe.adaptations)
    _measure(opened, wanted or default, tasks, Console(highlight=False))


def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders that koi train made.")
    ],
) -> None:
    """Print the results of runs beside the paper's, as a Markdown table."""
    typer.echo(runs.markdown_table([Run(folder) for folder in folders]))


def export(
    run: RunFolder, file: Annotated[Path, typer.Argument(help="Where to write the learner.")]
) -> None:
    """Write a run's learner as one small file, which Koi.load and koi demo read."""
    runs.export(Run(run), file)
    typer.echo(f"{file}: {file.stat().st_size:,} bytes")


def _measure(run: Run, shots: list[int], num_tasks: int, console: Console) -> None:
    console.print(f"Adapting to {num_tasks:,} test tasks")
    for num_shots in shots:
        runs.measure(run, num_shots, num_tasks)
    plots.save(plots.learning_curve(run.validations(), run.results()), run.picture)
    runs.write_card(run)
    typer.echo(runs.markdown_table([run]))
    console.print(f"Picture: {run.picture}", soft_wrap=True)
