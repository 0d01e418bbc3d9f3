"""The command ``koi``: what goes wrong is said in one line."""

from __future__ import annotations

import sys
from typing import NoReturn

from koi.errors import KoiError, printable

_WRONG_USE = 2
_INTERRUPTED = 130  # as the shell has it for Ctrl-C
# What a command may lack, and the extra that brings it.
_EXTRAS = dict.fromkeys(("matplotlib", "rich", "typer"), "cli") | dict.fromkeys(
    ("anyio", "pydantic", "starlette", "uvicorn"), "demo"
)


def main() -> None:
    """Run the command line and exit."""
    try:
        sys.exit(_run(sys.argv[1:] or ["--help"]))
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f'the command needs {error.name}: pip install "koi-x[{_EXTRAS[error.name]}]"', 1)
    except (KoiError, OSError) as error:
        _fail(str(error), _WRONG_USE)


def _run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    import typer  # here, since the library does without

    from koi.lab.cli.commands import app

    try:
        code = app(arguments, prog_name="koi", standalone_mode=False) or 0
    except typer.Abort:  # Ctrl-C in older Typers; newer ones return its exit code
        code = _INTERRUPTED
    except Exception as error:
        # Wrong use is an exception of Click, which newer Typers carry inside themselves.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), _WRONG_USE)
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return int(code)


def _fail(message: str, code: int) -> NoReturn:
    print("koi:", "; ".join(map(printable, message.splitlines())), file=sys.stderr)
    sys.exit(code)
