"""The learner's arguments on the site, which the source alone does not show.

They are made of `koi.settings.Settings` when koi is imported: this puts the constructor's signature
and the class's docstring in as `help(koi.Koi)` has them.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from koi import Koi


class Settings(griffe.Extension):
    """Spells out the arguments of `koi.Koi`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace what the source says of the constructor."""
        learner, settings = pkg["learner.Koi"], pkg["settings.Settings"]
        before = learner.members["__init__"].parameters
        arguments = (
            griffe.Parameter(
                name,
                annotation=settings.members[name].annotation,
                kind=griffe.ParameterKind[given.kind.name.lower()],
                default=repr(given.default),
            )
            for name, given in inspect.signature(Koi).parameters.items()
            if name != "model"
        )
        learner.members["__init__"].parameters = griffe.Parameters(
            before["self"], before["model"], *arguments
        )
        learner.docstring.value = inspect.getdoc(Koi)
