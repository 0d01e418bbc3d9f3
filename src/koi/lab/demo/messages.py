"""What the page may ask, and how it is told what is wrong with a question."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from koi.lab.demo.classifier import MAX_CLASSES, MIN_CLASSES

MAX_BYTES = 256 * 1024
MAX_STEPS = 10
MAX_STROKES = 64
MAX_POINTS = 2000

_NUM_SHOWN = 3


def _few_points(drawing: list[list[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    count = sum(map(len, drawing))
    if count > MAX_POINTS:
        raise ValueError(f"the drawing has {count} points, at most {MAX_POINTS} are allowed")
    return drawing


# Parts of the pad, and somewhat beyond its edge.
_Coordinate = Annotated[float, Field(ge=-1, le=2, allow_inf_nan=False)]
_Stroke = Annotated[list[tuple[_Coordinate, _Coordinate]], Field(min_length=1)]
_Drawing = Annotated[
    list[_Stroke], Field(min_length=1, max_length=MAX_STROKES), AfterValidator(_few_points)
]


class Question(BaseModel):
    """Drawings to learn from, one of each class, and one to classify.

    Args:
        examples: a drawing of each class; a drawing is a list of strokes, a stroke a list of
            points [x, y] in parts of the pad, y from top to bottom.
        query: the new drawing, or None to adapt only.
        num_steps: inner steps.
        initialisation: where they start.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    examples: Annotated[list[_Drawing], Field(min_length=MIN_CLASSES, max_length=MAX_CLASSES)]
    query: _Drawing | None = None
    num_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = MAX_STEPS
    initialisation: Literal["learned", "random"] = "learned"


def explanation(error: ValidationError) -> str:
    """Return in one sentence what is wrong and where, the first few mistakes of many.

    >>> try:
    ...     Question(examples=[[[(0.1, 0.2)]]] * 3, num_steps=-1)
    ... except ValidationError as error:
    ...     print(explanation(error))
    num_steps: input should be greater than or equal to 0
    """
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{_place(mistake['loc'])}: {_lowered(mistake['msg'])}" for mistake in mistakes]
    more = len(shown) - _NUM_SHOWN
    return "; ".join(shown[:_NUM_SHOWN]) + (f"; and {more} more mistakes" if more > 0 else "")


def _place(location: tuple[int | str, ...]) -> str:
    """Return where in the question something is: examples[0][2]."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".") or "the question"


def _lowered(message: str) -> str:
    message = message.removeprefix("Value error, ").replace(" after validation", "")
    return message[:1].lower() + message[1:]
