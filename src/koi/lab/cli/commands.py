"""The commands of ``koi``, gathered: each reads what was typed, runs something, and prints."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand, TyperGroup

import koi
from koi.lab.cli import classifier, fewshot
from koi.lab.cli.demo import demo
from koi.lab.cli.sine import sine


class _Flags:
    """Options without a value, in a help that names no type for them."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, --help among them."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_Flags, TyperCommand):
    pass


class _Group(_Flags, TyperGroup):
    pass


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"koi {koi.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions and exit."
        ),
    ] = False,
) -> None:
    """Learn initialisations from which a few gradient steps learn a new task."""


_COMMANDS = (
    sine,
    demo,
    fewshot.recipes,
    fewshot.train,
    fewshot.evaluate,
    fewshot.table,
    fewshot.export,
    classifier.adapt,
    classifier.predict,
)
for command in _COMMANDS:
    app.command(cls=_Command)(command)
