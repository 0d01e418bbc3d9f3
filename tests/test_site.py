"""What the documentation's site does beyond MkDocs (`docs/hooks/`); `make check` builds it."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import griffe
import pytest

from koi import Koi

HOOKS = Path(__file__).resolve().parent.parent / "docs" / "hooks"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hook_{name}", HOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "is_found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ("<script async src=//cdn.example/x.js></script>", True),
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ('<img alt="a" src="http://example.org/a.png">', True),
        ('<script src="assets/x.js"></script><img src="a.png">', False),
        ('<a href="https://example.org">a link waits to be followed</a>', False),
    ],
)
def test_what_another_host_serves_is_found(page, is_found):
    assert bool(hook("site").REQUEST.search(page)) == is_found


def test_a_link_out_of_the_documentation():
    """To a file or a folder; within docs/ MkDocs sees to it."""
    site = hook("site")
    file = type("File", (), {"src_uri": "uses/text.md"})()

    def linked(link):
        return site.linked(file, site.OUTSIDE.search(f"[a]({link})"))

    assert linked("../../src/koi/phi/update.py#L3") == Path("src/koi/phi/update.py")
    assert linked("../../benchmarks") == Path("benchmarks")
    assert linked("../engines.md") is None
    assert site.OUTSIDE.search("[a](https://example.org/../x)") is None


def test_a_page_for_a_source_file_shows_all_of_it():
    site = hook("site")
    assert (HOOKS / "site.py").read_text("utf-8") in site.listing(Path("docs/hooks/site.py"))
    assert "`site.py`" in site.listing(Path("docs/hooks"))


def test_the_learner_has_all_of_its_arguments():
    """The source alone says that there are settings, not which."""
    extensions = griffe.load_extensions(HOOKS / "settings.py")
    source = griffe.load("koi.learner", search_paths=[HOOKS.parents[1] / "src"])
    assert "step_size" not in source["Koi.__init__"].parameters
    package = griffe.load("koi", search_paths=[HOOKS.parents[1] / "src"], extensions=extensions)
    made = package["learner.Koi"]
    parameters = made.members["__init__"].parameters
    assert [p.name for p in parameters][1:] == list(inspect.signature(Koi).parameters)
    assert (str(parameters["seed"].annotation), parameters["seed"].default) == (
        "int | None",
        "None",
    )
    assert made.docstring.value == inspect.getdoc(Koi)


def test_doctests_are_fenced():
    docstring = "Add.\n\n    >>> 1 + 1\n    2\n\n    More.\n\n>>> a = 1\n>>> a\n1"
    expected = (
        "Add.\n\n    ```pycon\n    >>> 1 + 1\n    2\n    ```\n\n    More.\n\n"
        "```pycon\n>>> a = 1\n>>> a\n1\n```"
    )
    assert hook("doctests").fenced(docstring) == expected
