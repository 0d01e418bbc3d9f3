"""Text from anywhere in Markdown: what it says is shown, whatever it would mean there."""

from __future__ import annotations

import html
import re
from typing import Any
from urllib.parse import quote

from koi.errors import printable

_MARKS = re.compile(r"([\\`*_\[\]|~$])")
_BEGINNINGS = re.compile(r"^(\d{1,9})([.)])|^([#+=-])")


def text(value: Any) -> str:
    r"""Return a line of text: no HTML, no mark, no table's edge in it has its meaning.

    >>> print(text("a|b <script> *c*"))
    a\|b &lt;script&gt; \*c\*
    """
    line = html.escape(_line(value), quote=False)
    return _BEGINNINGS.sub(r"\1\\\2\3", _MARKS.sub(r"\\\1", line))


def code(value: Any) -> str:
    r"""Return a line of code, which may stand in a table.

    >>> print(code("a`b"), code("x|y"))
    ``a`b`` `x\|y`
    """
    line = _line(value)
    fence = "`" * (_longest(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def block(value: Any, language: str) -> str:
    """Return lines of code, whose fence is longer than any in it."""
    lines = "\n".join(map(printable, str(value).split("\n")))
    fence = "`" * max(3, _longest(lines) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def link(name: Any, address: Any) -> str:
    """Return a link; to what is no page of the web, the name alone.

    >>> link("page", "https://example.org/a b"), link("trap", "javascript:alert(1)")
    ('[page](https://example.org/a%20b)', 'trap')
    """
    target = str(address)
    if not re.match(r"https?://", target, re.ASCII | re.IGNORECASE):
        return text(name)
    return f"[{text(name)}]({quote(target, safe='/:?#@!$&+,;=%~-._', errors='replace')})"


def _line(value: Any) -> str:
    return printable(" ".join(str(value).split()))


def _longest(line: str) -> int:
    """Return how many backticks there are in a row at most."""
    return max(map(len, re.findall("`+", line)), default=0)
