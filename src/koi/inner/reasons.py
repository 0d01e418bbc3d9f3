"""Why torch could not map or compile a loss, whose code that is, and what to change."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary, extract_tb

import torch

_ADVICE = {
    ".item()": "keep tensors as they are, without .item(), float() or if on their values",
    "data-dependent": "write torch.where in the place of if on a tensor's values",
    # derivatives with respect to inputs, as losses of physics have them
    **dict.fromkeys(
        ("requires_grad_", "does not require grad"),
        "differentiate by torch.func.grad or torch.func.jvp in the place of requires_grad_() and "
        "torch.autograd.grad",
    ),
    # a tensor that stands for many tasks has no memory that NumPy could read
    "data pointer": "compute with torch, or in sample(), what is now computed with NumPy",
}
# These hold for the code of a library too, which the user cannot write otherwise.
_ADVICE_ANYWHERE = {
    "escaped from inside": "what is computed again or kept for later (torch.utils.checkpoint) is "
    "of many tasks then: switch that off, or use vectorize=False",
    "_NoopSaveInputs": "switch off what computes activations again (torch.utils.checkpoint), or "
    "use vectorize=False",  # as torch 2.6 says it
    "saved tensor hooks": "switch off what computes activations again (torch.utils.checkpoint), or "
    "use vectorize=False, compile=False",
    "setup_context": "give the torch.autograd.Function a setup_context and generate_vmap_rule (of "
    "torch.utils.checkpoint take use_reentrant=False), or use vectorize=False",
}
_INSTALLED = re.compile(r"(?:site|dist)-packages[/\\](.*)")
_TORCH, _KOI = Path(torch.__file__).parent, Path(__file__).parents[1]
_PYTHON = sysconfig.get_paths()["stdlib"]


def reason_of(error: Exception) -> str:
    r"""Return in one line why torch could not map or compile a loss, and where.

    >>> reason_of(RuntimeError("backend='inductor' raised:\nNotImplementedError: as_strided"))
    'NotImplementedError: as_strided'
    """
    explained = re.search(r"Explanation: (.*)", str(error))
    if explained:
        why = explained[1]
    else:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        named = [line for line in lines if not line.endswith("raised:")]
        why = named[0] if named else type(error).__name__
    return why + line_of(frames_of(error))


def advice_on(error: Exception, otherwise: str) -> str:
    """Return what to change in a loss that torch could not map or compile."""
    for sign, text in {**_ADVICE, **_ADVICE_ANYWHERE}.items():
        if sign in str(error):
            return text if sign in _ADVICE_ANYWHERE else advice(frames_of(error), text, otherwise)
    return otherwise


def advice(frames: Sequence[FrameSummary], own: str, otherwise: str) -> str:
    """Return ``own`` where the line that failed is the user's, else what can be done about it."""
    whose = _whose(frames)
    installed = whose and _INSTALLED.search(whose.filename)
    if not installed:
        return own
    library = re.split(r"[/\\.]", installed[1])[0]
    return f"see whether a setting of {library} avoids it, or {otherwise}"


def line_of(frames: Sequence[FrameSummary]) -> str:
    """Return which line failed, of those that are neither Koi's nor torch's; "" where none is.

    >>> line_of([FrameSummary("train.py", 12, "loss", line="if x.sum() > 0:")])
    '; train.py, line 12: `if x.sum() > 0:`'
    """
    whose = _whose(frames)
    if whose is None:
        return ""
    installed = _INSTALLED.search(whose.filename)
    name = installed[1] if installed else os.path.basename(whose.filename)
    return f"; {name}, line {whose.lineno}" + (f": `{whose.line}`" if whose.line else "")


def frames_of(error: BaseException) -> list[FrameSummary]:
    """Return the lines that led to an error, those that the compiler read included."""
    read = str(error).partition("from user code:")[2]
    found = re.findall(r'File "(.+)", line (\d+), in (.+)\n\s*(.*)', read)
    traced = [FrameSummary(file, int(line), name, line=text) for file, line, name, text in found]
    return [*extract_tb(error.__traceback__), *traced]


def _whose(frames: Sequence[FrameSummary]) -> FrameSummary | None:
    """Return the last line that is neither Koi's, torch's nor Python's."""
    for frame in reversed(frames):
        path = Path(frame.filename)
        ours = _KOI in path.parents or _TORCH in path.parents or frame.filename.startswith("<")
        pythons = frame.filename.startswith(_PYTHON) and not _INSTALLED.search(frame.filename)
        if not ours and not pythons:
            return frame
    return None
