"""Ready task distributions, and ready data to make them of."""

from koi.problems import mini_imagenet, omniglot
from koi.problems.lines import Lines
from koi.problems.sines import Sines

__all__ = ["Lines", "Sines", "mini_imagenet", "omniglot"]
