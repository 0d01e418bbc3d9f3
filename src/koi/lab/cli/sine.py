"""``koi sine``: the sine waves of the paper, with a table and a picture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from koi import Evaluation, Koi, plots, recipes
from koi.evaluation import doubling
from koi.plots import Wave

_SHOWN_STEPS = (0, 1, 32)


def sine(
    iterations: Annotated[
        int, typer.Option(min=1, metavar="N", help="Waves to learn from; the paper: 30000.")
    ] = 10_000,
    tasks: Annotated[int, typer.Option(min=2, metavar="N", help="New waves to measure on.")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="The same seed gives the same numbers.")
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(metavar="PATH", help="The picture (png, pdf or svg), or a folder for it."),
    ] = Path("sine.png"),
) -> None:
    """Learn to fit sine waves (section 5.1 of the Reptile paper).

    Trains a small network on waves of random amplitude and phase. Then lets it adapt to new
    waves seen at 10 points, beside the same network with its first, random weights. Prints the
    error after 0, 1, 2, 4 … 32 gradient steps and draws a picture. Half a minute with the
    defaults.
    """
    path = _picture_path(out)
    # Matrices of 64 × 64 are too small to share: more threads only wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = recipes.sine(iterations)
    model = recipe.model()
    random = Koi(copy.deepcopy(model), **recipe.settings, seed=seed)
    learned = Koi(model, **recipe.settings, seed=seed)

    console = Console(highlight=False)
    console.print(f"Learning an initialisation from {iterations:,} sine waves")
    learned.train(recipe.tasks)
    console.print(f"Adapting to {tasks:,} new waves, each seen at 10 points")
    learners = {"learned initialisation": learned, "random initialisation": random}
    # With a seed, both see the same waves.
    curves = {
        title: learner.evaluate(recipe.new_tasks, tasks, recipe.num_new_steps)
        for title, learner in learners.items()
    }
    console.print(_table(curves))
    wave = recipe.new_tasks.sample()
    waves = {title: _adapted(learner, wave) for title, learner in learners.items()}
    plots.save(plots.sine_figure(waves, curves), path)
    console.print(f"Picture: {path}", soft_wrap=True)


def _picture_path(out: Path) -> Path:
    """Return the file to write, so that a wrong path shows before the work is done."""
    path = out / "sine.png" if out.is_dir() else out
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint="--out")
    if path.suffix.lower() not in plots.SUFFIXES:
        kinds = ", ".join(plots.SUFFIXES)
        raise typer.BadParameter(f"{path.name} must end in one of {kinds}", param_hint="--out")
    return path


def _adapted(learner: Koi, task: Any) -> Wave:
    """Return the wave and what the network makes of it after a few numbers of steps."""
    adapted = {steps: learner.adapt(task, num_steps=steps) for steps in _SHOWN_STEPS}
    order = task.query_inputs.flatten().argsort()
    inputs = task.query_inputs[order]
    return Wave(
        inputs=inputs,
        truth=task.query_targets[order],
        seen_inputs=task.support_inputs,
        seen_targets=task.support_targets,
        predictions={steps: model(inputs).detach() for steps, model in adapted.items()},
    )


def _table(curves: dict[str, Evaluation]) -> Table:
    """Return the error after 0, 1, 2, 4 … steps, a column for each initialisation."""
    table = Table(title="Mean squared error and 95 % interval")
    table.add_column("gradient steps", justify="right")
    for title in curves:
        table.add_column(title, justify="right")
    num_steps = next(iter(curves.values())).num_steps
    columns = [
        [f"{m:.3f} ± {half:.3f}" for m, half in zip(curve.mean, curve.interval, strict=True)]
        for curve in curves.values()
    ]
    for step in doubling(num_steps):
        table.add_row(str(step), *(column[step] for column in columns))
    return table
