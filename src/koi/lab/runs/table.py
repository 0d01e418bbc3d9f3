"""Results of runs beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from shlex import quote

from koi.errors import DataError
from koi.lab.markdown import text
from koi.lab.runs.folder import Run
from koi.recipes.fewshot import BESIDE, PAPER, RECIPES

_HEAD = (
    "run",
    "recipe",
    "meta-iterations",
    "shots",
    "tasks",
    "accuracy, %",
    "this run",
    "the paper",
    "distance",
)
_WORDS = ("run", "recipe", "accuracy, %")  # columns that are no numbers
_NOTHING = "–"

# Whether a column is of numbers, its title, and a cell for each row.
Column = tuple[bool, str, Sequence[str]]


def columns(runs: Iterable[Run]) -> list[Column]:
    """Return results, a row for each run, number of shots and way to measure.

    Intervals are of 95 %. A run of fewer meta-iterations than its recipe's says so. Tasks are left
    out where what came of them was not finite. A column in which there would be nothing is not
    there, such as the paper's where it has no number.
    """
    rows = [row for run in runs for row in _rows(run)]
    cells = zip(*rows, strict=True) if rows else ((),) * len(_HEAD)
    found = [(name not in _WORDS, name, tuple(c)) for name, c in zip(_HEAD, cells, strict=True)]
    return [column for column in found if set(column[2]) != {_NOTHING}]


def markdown_table(runs: Iterable[Run]) -> str:
    """Return `columns` as a table in Markdown."""
    found = columns(runs)
    escaped = (cells if is_number else map(text, cells) for is_number, _, cells in found)
    lines = [
        tuple(name for _, name, _ in found),
        tuple("--:" if is_number else ":--" for is_number, _, _ in found),
        *zip(*escaped, strict=True),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def check_measured(runs: Iterable[Run]) -> None:
    """Check that each run has a result.

    Raises:
        ConfigurationError: a folder is no run's.
        DataError: some have none, which are all named.
    """
    missing = [run.folder for run in runs if run.config() and not run.results()]
    if missing:
        raise DataError(
            "\n".join(
                f"{folder} has no result yet: measure it by koi evaluate {quote(str(folder))}"
                for folder in missing
            )
        )


def _rows(run: Run) -> Iterator[tuple[str, ...]]:
    recipe = run.config().recipe
    whole = RECIPES[recipe.name].num_iterations if recipe.name in RECIPES else None
    for num_shots, result in run.results().items():
        done = result["iteration"]
        length = f"{done:,}"
        if whole is not None and done != whole:
            length += (
                f" of {whole:,} (shortened)" if done < whole else f" (longer than its {whole:,})"
            )
        published = PAPER.get((BESIDE.get(recipe.name, recipe.name), num_shots), (None, None))
        tasks, skipped = f"{result['num_tasks']:,}", result.get("num_skipped", 0)
        for way, paper in zip(("inductive", "transductive"), published, strict=True):
            mean, interval = (100 * value for value in result[way])
            yield (
                str(run.folder),
                recipe.name,
                length,
                str(num_shots),
                tasks + (f" ({skipped:,} left out)" if skipped else ""),
                way,
                f"{mean:.2f} ± {interval:.2f}",
                _NOTHING if paper is None else f"{paper[0]:.2f} ± {paper[1]:.2f}",
                _NOTHING
                if paper is None
                else f"{round(mean - paper[0], 2) + 0.0:+.2f}",  # no −0.00
            )
