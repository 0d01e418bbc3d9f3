"""Models of transformers and peft as a tokenizer's output meets them: all at once, padding and all.

Every case with and without padding in one meta-batch, so that tasks part at each ``if`` that looks
whether anything is masked.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from case_transformers import ARCHITECTURES, Sentences, language_model
from koi import Koi
from koi.errors import EngineError

pytest.importorskip("transformers", reason="needs transformers")

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread"),
    # torch says of its own operations that vmap maps them slowly
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # peft reads a name that transformers has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SETTINGS = {"meta_step_size": 0.5, "meta_batch_size": 3, "seed": 0}
EACH_TIME = ("Bert", "GPT2", "Llama")


def trained(model, **settings):
    """Return the learner and how φ has moved in two meta-iterations of two steps."""
    model = copy.deepcopy(model)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    koi = Koi(model, 0.1, 2, 2, **SETTINGS, **settings)
    koi.train(Sentences())
    return koi, nn.utils.parameters_to_vector(model.parameters()).detach() - before


def assert_together_as_one_by_one(model):
    at_once, moved = trained(model, vectorize=True, check=False)
    assert at_once.engine == "vectorized"
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(moved, trained(model, vectorize=False)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.slow)
     for name in ARCHITECTURES],
)  # fmt: skip
def test_a_padded_batch_all_at_once_is_that_of_one_by_one(name):
    assert_together_as_one_by_one(language_model(name))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EACH_TIME)
def test_with_every_attention_that_can_be_mapped(name, attention):
    model = language_model(name)
    model.set_attn_implementation(attention)
    assert_together_as_one_by_one(model)


def adapted(kind, **settings):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = getattr(peft, kind)(target_modules=["query", "value"], r=2, **settings)
    return peft.get_peft_model(language_model("Bert"), config).double()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoraConfig", {"init_lora_weights": False}),
        ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
        # these two draw whether a layer is left out
        ("LoHaConfig", {"init_weights": False}),
        ("LoKrConfig", {"init_weights": False}),
    ],
)
def test_adapters(kind, settings):
    assert_together_as_one_by_one(adapted(kind, **settings))


@pytest.mark.slow
def test_a_layer_that_some_tasks_leave_out_is_named():
    model = adapted("LoKrConfig", module_dropout=0.5)
    with pytest.raises(EngineError, match=r"peft/tuners/lokr/layer\.py, line \d+: `if \(not self"):
        trained(model, vectorize=True, check=False)


def test_the_line_of_a_library_is_named(caplog):
    """BLOOM has its activation in a function that cannot be mapped."""
    size = {"hidden_size": 8, "n_layer": 1, "n_head": 2}
    koi, _ = trained(language_model("Bloom", **size), check=False)
    assert koi.engine == "eager"
    (line,) = (record.getMessage() for record in caplog.records if record.name == "koi")
    assert "transformers/models/bloom/modeling_bloom.py, line" in line
    assert "`return GeLUFunction.apply(x)`" in line


def test_masks_of_the_user_are_left_as_they_were():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    model, calls = language_model("Bert"), []
    before = MASKS["sdpa"]

    def own(*args, **kwargs):
        calls.append(kwargs["allow_is_bidirectional_skip"])
        return before(*args, **kwargs)

    MASKS["sdpa"] = own
    try:
        trained(model, vectorize=True, check=False)
        assert MASKS["sdpa"] is own
    finally:
        del MASKS["sdpa"]
    assert calls
    assert not any(calls)
    assert MASKS["sdpa"] is before
    trained(model, vectorize=True, check=False)
    assert MASKS["sdpa"] is before is sys.modules["transformers.masking_utils"].sdpa_mask
