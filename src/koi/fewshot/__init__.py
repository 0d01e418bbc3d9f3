"""N-way K-shot episodes from any labelled data."""

from koi.fewshot.data import LabelledData, labelled

__all__ = ["LabelledData", "labelled"]
