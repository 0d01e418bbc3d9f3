"""Results of runs beside the paper's, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from koi.lab.runs.folder import Run
from koi.recipes.fewshot import BESIDE, PAPER, RECIPES

_HEAD = (
    "run",
    "meta-iterations",
    "shots",
    "tasks",
    "accuracy, %",
    "this run",
    "the paper",
    "distance",
)


def markdown_table(runs: Iterable[Run]) -> str:
    """Return a row for each run, number of shots and way to measure, with the paper's numbers.

    Intervals are of 95 %. A run of fewer meta-iterations than its recipe's says so. Tasks are left
    out where what came of them was not finite.
    """
    rows = [row for run in runs for row in _rows(run)]
    lines = [_HEAD, tuple(":--" if i in (0, 4) else "--:" for i in range(len(_HEAD))), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows(run: Run) -> Iterator[tuple[str, ...]]:
    recipe = run.config().recipe
    whole = RECIPES[recipe.name].num_iterations if recipe.name in RECIPES else None
    for num_shots, result in run.results().items():
        done = result["iteration"]
        length = f"{done:,}" if whole in (done, None) else f"{done:,} of {whole:,} (shortened)"
        published = PAPER.get((BESIDE.get(recipe.name, recipe.name), num_shots), (None, None))
        tasks, skipped = f"{result['num_tasks']:,}", result.get("num_skipped", 0)
        for way, paper in zip(("inductive", "transductive"), published, strict=True):
            mean, interval = (100 * value for value in result[way])
            yield (
                recipe.name,
                length,
                str(num_shots),
                tasks + (f" ({skipped:,} left out)" if skipped else ""),
                way,
                f"{mean:.2f} ± {interval:.2f}",
                "–" if paper is None else f"{paper[0]:.2f} ± {paper[1]:.2f}",
                "–" if paper is None else f"{mean - paper[0]:+.2f}",
            )
