"""Runs: a recipe, trained and measured in a folder of its own, and what it adapts to."""

from koi.lab.runs.card import write_card
from koi.lab.runs.classifier import Classifier, adapt
from koi.lab.runs.export import export
from koi.lab.runs.folder import Config, Run
from koi.lab.runs.measuring import measure
from koi.lab.runs.table import check_measured, columns, markdown_table
from koi.lab.runs.training import train

__all__ = [
    "Classifier",
    "Config",
    "Run",
    "adapt",
    "check_measured",
    "columns",
    "export",
    "markdown_table",
    "measure",
    "train",
    "write_card",
]
