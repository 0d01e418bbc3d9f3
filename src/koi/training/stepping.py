"""What `koi.Koi.step` keeps from one call to the next."""

from __future__ import annotations

from typing import Any


class Stepping:
    """The surroundings of single meta-iterations on the same tasks."""

    def __init__(self) -> None:
        self.tasks: Any = None
        self.draws: Any = None
        self.ranks: Any = None
        self.watch: Any = None
        self.ready: Any = None

    def __reduce__(self) -> Any:
        """Let a copy, or another process, begin anew."""
        return Stepping, ()
