"""The benchmark that says how far an accuracy would move with other test characters."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent.parent / "benchmarks" / "which_characters.py"


@pytest.fixture(scope="module")
def spread():
    spec = importlib.util.spec_from_file_location("which_characters", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.spread


def simulated(difference, num_classes=400, num_tasks=40_000):
    """Tasks whose accuracy is the mean of five characters' own, and noise."""
    classes = torch.rand(num_tasks, num_classes).topk(5, 1).indices
    own = 0.9 + difference * torch.randn(num_classes, dtype=torch.float64)
    noise = 0.1 * torch.randn(num_tasks, dtype=torch.float64)
    return own[classes].mean(1) + noise, classes, num_classes


def test_what_characters_differ_by(spread):
    """A mean over C characters that differ by s has the standard error s / √C."""
    over_tasks, over_characters = spread(*simulated(0.05))
    assert over_characters == pytest.approx(0.05 / math.sqrt(400), rel=0.25)
    assert over_tasks == pytest.approx(math.hypot(0.1, 0.05 / math.sqrt(5)) / 200, rel=0.1)


def test_characters_that_are_all_alike(spread):
    over_tasks, over_characters = spread(*simulated(0.0))
    assert over_characters < 2 * over_tasks
