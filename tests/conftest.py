import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def known_random_state():
    """Start every test from the same global random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Make float64 the type of new tensors, so that only mistakes are larger than rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
