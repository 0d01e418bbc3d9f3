"""What Koi learns in adapters of PEFT is a file that PEFT loads with no Koi."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import koi
from koi import Koi

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

# peft reads a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}


def base():
    """The same small BERT each time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, intermediate_size=16, num_labels=3, hidden_dropout_prob=0.0
    )
    config.attention_probs_dropout_prob = 0.0
    return transformers.BertForSequenceClassification(config)


@koi.tensor_task
@dataclasses.dataclass
class Sentences:
    words: torch.Tensor
    labels: torch.Tensor

    def loss(self, model):
        return F.cross_entropy(model(input_ids=self.words).logits, self.labels)


class Tasks:
    def sample(self):
        return Sentences(torch.randint(12, (6, 5)), torch.randint(3, (6,)))


@pytest.mark.parametrize("what", ["phi", "adapted"])
def test_round_trip(what, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base(), config)
    koi = Koi(model, 0.5, 2, 3, meta_step_size=1.0, meta_batch_size=2, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    koi.train(Tasks())
    moved = {name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()}
    assert {name.split(".")[-3] for name in moved} >= {"lora_A", "lora_B"}
    assert all("lora" in name or "classifier" in name for name in moved)

    learned = koi.model if what == "phi" else koi.adapt(Tasks().sample())
    learned.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    words = torch.randint(12, (4, 5))
    with torch.no_grad():
        expected, start = (each.eval()(words).logits for each in (learned, base()))
        assert torch.equal(loaded.eval()(words).logits, expected)
        assert not torch.allclose(start, expected)
