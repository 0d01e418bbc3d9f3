"""Small models of torchvision and timm, which many start from: every engine as one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine_toys import ENGINES, assert_agree
from koi import Koi
from koi.supervised import SupervisedTask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("float64", "one_thread"),
    # torch says of its own operations that vmap maps them slowly
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

# No dropout: draws are not the same in all engines. Nor networks in which BatchNorm makes 1e-15 in
# a weight 1e-1 after two steps of four images, as ShuffleNet: two runs one by one then part so.
TORCHVISION = {
    "resnet18": {},
    "mobilenet_v3_small": {"dropout": 0.0},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {"dropout": 0.0},
}
TIMM = ("resnet10t", "vit_tiny_patch16_224")
SIZES = {"vit_tiny_patch16_224": {"img_size": 32, "depth": 2}}


class Images:
    """Four images of two classes."""

    def sample(self):
        images, labels = torch.randn(2, 4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
        return SupervisedTask(
            images[0], labels, images[1], labels, torch.tensor(0), F.cross_entropy
        )


def trained(model, engine):
    vectorize, compile = ENGINES[engine]
    torch.manual_seed(0)
    learner = Koi(
        model, 0.01, 2, 2, meta_step_size=0.5, meta_batch_size=2, seed=0, check=False,
        vectorize=vectorize, compile=compile,
    )  # fmt: skip
    learner.train(Images())
    assert learner.engine == engine
    return learner


def check(make, engine, request):
    if "compiled" in engine:  # without Inductor, which takes minutes for each
        request.getfixturevalue("traced")
    one_by_one, other = (trained(make(), name) for name in ("eager", engine))
    assert_agree(other, one_by_one)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, engine, request):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")

    def make():
        torch.manual_seed(0)
        return getattr(models, name)(num_classes=2, **TORCHVISION[name])

    check(make, engine, request)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, engine, request):
    timm = pytest.importorskip("timm", reason="needs timm")

    def make():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=2, **SIZES.get(name, {})).double()

    check(make, engine, request)
