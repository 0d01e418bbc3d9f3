"""N-way K-shot episodes from any labelled data."""

from koi.fewshot.data import LabelledData, Splits, labelled

__all__ = ["LabelledData", "Splits", "labelled"]
