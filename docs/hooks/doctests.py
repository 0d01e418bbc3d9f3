"""Doctests in docstrings are shown as code, not as Markdown's triple quotation."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next blank line, with what is printed in between.
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def fenced(docstring: str) -> str:
    """Return the docstring with a fence around each example."""
    return EXAMPLE.sub(
        lambda found: f"{found['indent']}```pycon\n{found[0].rstrip()}\n{found['indent']}```",
        docstring,
    )


class Doctests(griffe.Extension):
    """Fences the examples of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
