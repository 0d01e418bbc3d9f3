"""Runs: a recipe, trained and measured in a folder of its own, and what it adapts to."""

from koi.runs.card import write_card
from koi.runs.classifier import Classifier, adapt
from koi.runs.export import export
from koi.runs.folder import Config, Run
from koi.runs.measuring import measure
from koi.runs.table import markdown_table
from koi.runs.training import train

__all__ = [
    "Classifier",
    "Config",
    "Run",
    "adapt",
    "export",
    "markdown_table",
    "measure",
    "train",
    "write_card",
]
