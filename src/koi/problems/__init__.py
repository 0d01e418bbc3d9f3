"""Ready task distributions, and ready data to make them of."""

from koi.problems import omniglot
from koi.problems.lines import Lines
from koi.problems.sines import Sines

__all__ = ["Lines", "Sines", "omniglot"]
