"""House rules that a diff does not show: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PACKAGE = SRC / "koi"

# Each module or room of koi, and those that it imports from, no more and no fewer: all of them
# lower in the table. Inside a room, files import each other freely. "koi" is koi/__init__.py, the
# door; who imports names from the door, as a user does, has "koi" in its row.
_TABLE = {
    "__main__": "lab",
    "koi": "learner evaluation ragged phi records supervised clients tasks errors",
    "lab": "koi plots recipes problems models fewshot training algorithms settings evaluation "
    "storage files randomness allowed errors",
    "plots": "evaluation records allowed errors",
    "recipes": "problems models fewshot algorithms phi tasks allowed errors",
    "problems": "fewshot storage files memory supervised tasks allowed errors",
    "models": "allowed",
    "fewshot": "evaluation files memory ragged supervised tasks randomness allowed errors",
    "learner": "adapting engines training ranks configured settings "
    "sampling phi records randomness errors",
    "adapting": "stored engines settings evaluation sampling inner phi randomness allowed",
    "stored": "training configured phi allowed errors",
    "engines": "settings inner algorithms phi memory errors",
    "training": "ranks configured settings sampling inner algorithms phi records storage "
    "files memory clients tasks randomness allowed errors",
    "ranks": "phi memory errors",
    "configured": "settings errors",
    "settings": "allowed inner algorithms phi errors",
    "evaluation": "sampling tasks randomness allowed errors",
    "sampling": "tasks randomness errors",
    "inner": "algorithms phi ragged tasks randomness errors",
    "algorithms": "phi allowed errors",
    "phi": "allowed errors",
    "records": "",
    "storage": "files memory errors",
    "files": "",
    "memory": "",
    "ragged": "supervised tasks randomness allowed errors",
    "supervised": "tasks randomness allowed errors",
    "clients": "errors",
    "tasks": "errors",
    "randomness": "",
    "allowed": "errors",
    "errors": "",
}
IMPORTS = {here: set(theirs.split()) for here, theirs in _TABLE.items()}

# Packages from outside that come with `pip install koi-x`, and those that an extra brings or that
# a user may or may not have. The latter are imported inside the function that needs them.
REQUIRED = {"numpy", "safetensors", "torch", "tqdm"}
TOP_LEVEL: dict[str, set[str]] = {
    "lab.cli": REQUIRED | {"rich", "typer"},
    "lab.demo": REQUIRED | {"anyio", "pydantic", "starlette", "uvicorn"},
    "plots": REQUIRED | {"matplotlib"},
}
LAZY: dict[str, set[str]] = {
    "fewshot": {"PIL"},
    "lab": {"huggingface_hub"},
    "problems": {"PIL", "pooch"},
}

MAX_LINES = 400


class Import(NamedTuple):
    """One imported name: where, which, and whether it happens as soon as the file is imported."""

    path: Path
    line: int
    name: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.name}"


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The row of the table that a dotted module belongs to: koi.inner.eager -> inner."""
    return module.split(".")[1] if "." in module else module


def is_module(name: str) -> bool:
    path = SRC.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[Import]:
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield Import(path, node.lineno, name if is_module(name) else source, at_import)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inside in ast.iter_child_nodes(node):
                yield from visit(inside, at_import and not lazy)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "koi"


def test_imports_run_downwards() -> None:
    order = list(IMPORTS)
    upwards = {
        f"{here} imports from {there}, which stands above it"
        for here, theirs in IMPORTS.items()
        for there in theirs - {"koi"}
        if order.index(there) < order.index(here)
    }
    assert not upwards, "\n" + "\n".join(sorted(upwards))


def test_the_table_is_what_is_used() -> None:
    used: dict[str, set[str]] = {}
    lines = []
    for path in source_files():
        here = unit(module_name(path))
        found = used.setdefault(here, set())
        for entry in sorted({entry for entry in imports(path) if is_ours(entry.name)}):
            there = unit(entry.name)
            if there != here:
                found.add(there)
                if there not in IMPORTS.get(here, set()):
                    lines.append(f"{entry}, which {here} does not in the table")
    lines += [
        f"{here} no longer imports from {there}: take it out of the table"
        for here, theirs in IMPORTS.items()
        for there in sorted(theirs - used.get(here, set()))
    ]
    lines += [f"{here} is in the table and not there" for here in set(IMPORTS) - set(used)]
    lines += [
        f"add {here} to the table and to the tree in CONTRIBUTING.md"
        for here in set(used) - set(IMPORTS)
    ]
    assert not lines, "\n" + "\n".join(lines)


def test_third_party_imports() -> None:
    breaches = []
    for path in source_files():
        here = unit(module_name(path))
        part = ".".join(module_name(path).split(".")[1:3])
        top_level = TOP_LEVEL.get(part, TOP_LEVEL.get(here, REQUIRED)) | sys.stdlib_module_names
        lazy = top_level | LAZY.get(here, set())
        for entry in sorted({entry for entry in imports(path) if not is_ours(entry.name)}):
            package = entry.name.split(".")[0]
            if package not in lazy:
                breaches.append(f"{entry}, which {here} must do without")
            elif entry.at_import and package not in top_level:
                breaches.append(f"{entry} at the top; import it in the function that needs it")
    assert not breaches, "\n" + "\n".join(breaches)


def test_the_door_holds_names_and_version_only() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    others = [
        f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for node in tree.body[1:]
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and re.match(r"(__all__|__version__)\b", ast.unparse(node))
        )
    ]
    assert not others, "koi/__init__.py is names and version, nothing else:\n" + "\n".join(others)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_koi_is_light_and_training_loads_no_compiler() -> None:
    heavy = {
        "PIL",
        "jax",
        "matplotlib",
        "pooch",
        "pytest",
        "rich",
        "starlette",
        "torch._dynamo",
        "torch._inductor",
        "typer",
        "koi.inner.compiled",
        "koi.lab",
        "koi.recipes",
    }
    code = (
        "import sys, koi\n"
        "print(*sys.modules)\n"
        "import torch, koi.problems\n"
        "for vectorize in (False, True):\n"
        "    koi.Koi(torch.nn.Linear(1, 1), num_iterations=1, meta_batch_size=2, "
        "vectorize=vectorize).train(koi.problems.Lines())\n"
        "print(*sys.modules)"
    )
    imported, trained = (set(line.split()) for line in run_python(code).splitlines())
    assert "koi" in imported
    assert not imported & heavy
    assert not {name for name in trained if name.startswith("koi.inner.compiled.")}
    assert "torch._inductor.compile_fx" not in trained


def test_koi_works_without_what_extras_bring(tmp_path: Path) -> None:
    """As after `pip install koi-x`."""
    run_python(
        "import sys; sys.modules.update(PIL=None, pooch=None)\n"
        "import koi, koi.models, koi.problems, torch\n"
        "learner, path = koi.Koi(torch.nn.Linear(2, 1)), "
        f"{str(tmp_path / 'koi')!r}\n"
        "learner.save(path)\n"
        "read = koi.Koi.load(path, torch.nn.Linear(2, 1))\n"
        "assert torch.equal(read.model.weight, learner.model.weight)"
    )


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_outgrows_its_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: two ideas; give each a file"


def project_files() -> list[Path]:
    """What is or could be committed: known to git, or new and not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def test_no_path_of_somebodys_machine() -> None:
    machine = re.compile(r"(?<![\w.$}~-])/(?:root|tmp|home|work|Users)/")
    found = []
    for path in project_files():
        if path == Path(__file__).resolve():
            continue
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n" + "\n".join(found)
