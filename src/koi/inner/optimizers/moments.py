"""The moments of an optimizer as a flat list: what fits, and a row for each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from koi.errors import ConfigurationError
from koi.phi.arithmetic import Tensors


def check_moments(moments: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    """Check that moments to go on from are those of this optimizer, by their number and shapes.

    Raises:
        ConfigurationError: they are not.
    """
    found = [m.shape for m in moments]
    if found != list(shapes):
        pairs = zip(found, shapes, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        what = f"{len(found)} tensors where it keeps {len(shapes)}"
        if where is not None and len(found) == len(shapes):
            what = f"shape {tuple(found[where])} where it keeps {tuple(shapes[where])}"
        raise ConfigurationError(
            [
                f"the moments to go on from do not fit inner_optimizer ({what}): they are another "
                "optimizer's, or of other parameters; give the optimizer and the frozen parameters "
                "that they were made with, or inner_state='reset'"
            ]
        )


def spread(moments: Tensors, per_task: list[bool], num_tasks: int | None) -> Tensors:
    """Return φ's moments with a row for each task where they are per task."""
    if num_tasks is None:
        return moments
    return [
        m.expand(num_tasks, *m.shape) if rows else m
        for m, rows in zip(moments, per_task, strict=True)
    ]
