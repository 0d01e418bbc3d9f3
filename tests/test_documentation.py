"""The documentation runs: every Python block of every page, and every example.

A page becomes a script in which all but its Python blocks is blank, so that a traceback's line
numbers are the page's own. Blocks see what the blocks before them on the page defined. A block
that cannot run is marked on the line before it with `<!-- no-test: reason -->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240

# The exception: torch 2.13 warns of itself when `torch.compile` is first called.
WARNINGS = [
    "-W",
    "error",
    "-W",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
]

BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]*no-test:(?P<reason>(?:(?!-->).)*)-->[ ]*\n\s*?)?"
    r"^(?P<indent>[ ]*)```python\b[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def script_of(page: str) -> str:
    """The page's Python blocks, each on its own lines, everything else blank."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        start = page.count("\n", 0, block.start("code"))
        if block["reason"] is not None:
            assert block["reason"].strip(), f"line {start}: no-test needs a reason"
            continue
        for offset, line in enumerate(textwrap.dedent(block["code"]).splitlines()):
            lines[start + offset] = line
    return "\n".join(lines).rstrip() + "\n"


def run_script(script: Path, cwd: Path, **variables: str) -> None:
    """Run it as a user would, from an empty folder, with every warning an error."""
    done = subprocess.run(
        [sys.executable, *WARNINGS, script],
        cwd=cwd,
        env={**os.environ, "MPLBACKEND": "Agg", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS - 10,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    assert "warn" not in done.stderr.lower(), done.stderr[-8000:]


def files(*patterns: str) -> list[str]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def pages_with_code() -> list[str]:
    pages = files("README.md", "docs/**/*.md")
    return [page for page in pages if BLOCK.search((ROOT / page).read_text(encoding="utf-8"))]


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("page", pages_with_code())
def test_page(page: str, tmp_path: Path) -> None:
    script = tmp_path / (Path(page).stem + ".md.py")
    script.write_text(script_of((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    run_script(script, cwd)


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("example", files("examples/*.py"))
def test_example(example: str, tmp_path: Path) -> None:
    run_script(ROOT / example, tmp_path, KOI_EXAMPLE_SHORT="1")


PAGE = """\
# A page

```python
a = 1
```

- in a list

  ```python
  if a:
      b = 2
  ```

<!-- no-test: needs a download -->
```python
import nonsense
```

```bash
make test
```

```python
print(a + b)
```
"""


def test_script_keeps_line_numbers() -> None:
    lines = script_of(PAGE).splitlines()
    assert {number: line for number, line in enumerate(lines, 1) if line} == {
        4: "a = 1",
        10: "if a:",
        11: "    b = 2",
        24: "print(a + b)",
    }


def test_script_of_a_page_without_code_is_empty() -> None:
    assert script_of("# A page\n\nNothing to run.\n").strip() == ""


def test_skipping_needs_a_reason() -> None:
    with pytest.raises(AssertionError, match="needs a reason"):
        script_of("<!-- no-test: -->\n```python\nx\n```\n")


def test_only_the_block_right_after_the_mark_is_skipped() -> None:
    page = "<!-- no-test: this one -->\ntext\n\n<!-- other -->\n```python\nx = 1\n```\n"
    assert script_of(page).strip() == "x = 1"


def test_a_warning_or_a_failure_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for code in (
        "import warnings\nwarnings.warn('no')",
        "import sys\nprint('Warning: no', file=sys.stderr)",
        "1 / 0",
    ):
        script.write_text(code)
        with pytest.raises(AssertionError):
            run_script(script, tmp_path)
