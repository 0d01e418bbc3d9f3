"""N-way K-shot episodes from any labelled data."""

from koi.fewshot.accuracy import Accuracy, Estimate, accuracy
from koi.fewshot.data import LabelledData, Splits, labelled
from koi.fewshot.episodes import Episodes

__all__ = [
    "Accuracy",
    "Episodes",
    "Estimate",
    "LabelledData",
    "Splits",
    "accuracy",
    "labelled",
]
