"""Ready task distributions."""

from koi.problems.lines import Lines
from koi.problems.sines import Sines

__all__ = ["Lines", "Sines"]
