"""The notebooks run from top to bottom, and were run before they were committed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """The numbers of the cells that show one."""
    return [
        number
        for number, cell in enumerate(code_cells(notebook))
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


@pytest.mark.slow
def test_notebooks_run(tmp_path, monkeypatch):
    """In their short form, without a word on stderr, showing the pictures that are committed.

    One after the other in one kernel, which loads torch once and is emptied in between.
    """
    monkeypatch.setenv("KOI_EXAMPLE_SHORT", "1")
    together = nbformat.v4.new_notebook()
    for name in NOTEBOOKS:
        together.cells += nbformat.read(FOLDER / name, as_version=4).cells
        together.cells.append(nbformat.v4.new_code_cell("%reset -f"))
    shown = pictures(together)
    where = {"metadata": {"path": str(tmp_path)}}
    notebook = NotebookClient(
        together, kernel_name="python3", timeout=None, resources=where
    ).execute()
    said = [
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not said, said
    assert pictures(notebook) == shown


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_was_run_as_it_stands(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run all cells, from the top, then commit"
    assert pictures(notebook)
    assert (FOLDER / name).stat().st_size < MAX_BYTES


def test_there_are_notebooks():
    assert NOTEBOOKS
