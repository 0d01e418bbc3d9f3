"""Small language models of many architectures, with random weights, and sentences for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import koi

WORDS, LENGTH = 30, 6
_SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = _SIZE | _NO_DROPOUT
_EMBEDDED = _ENCODER | {"embedding_size": 8}
_DECODER = _SIZE | {"num_key_value_heads": 1}
_RELATIVE = _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_GPT = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.3,
}

# By the name that transformers has for them: what is to be predicted, and the configuration.
ARCHITECTURES = {
    "Bert": ("MaskedLM", _ENCODER),
    "GPT2": ("LMHeadModel", _GPT),
    "Llama": ("CausalLM", _DECODER),
    "Albert": ("MaskedLM", _EMBEDDED),
    "Bart": (
        "ConditionalGeneration",
        {
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
            "max_position_embeddings": 16,
            "dropout": 0.0,
            "decoder_start_token_id": 2,
        },
    ),
    "ConvBert": ("MaskedLM", _EMBEDDED),
    "DebertaV2": ("MaskedLM", _RELATIVE | {"position_buckets": 4}),
    "DistilBert": (
        "MaskedLM",
        {
            "dim": 8,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 8,
            "max_position_embeddings": 16,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "Electra": ("MaskedLM", _EMBEDDED),
    "Gemma3": ("CausalLM", _DECODER | {"head_dim": 4, "sliding_window": 4}),
    "GPTNeoX": ("CausalLM", _SIZE),
    "MPNet": ("MaskedLM", _ENCODER),
    "Mistral": ("CausalLM", _DECODER | {"sliding_window": 4}),
    "ModernBert": (
        "MaskedLM",
        _SIZE | {"global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "OPT": (
        "CausalLM",
        {
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 8,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 8,
            "dropout": 0.0,
        },
    ),
    "Phi": ("CausalLM", _SIZE),
    "Qwen3": ("CausalLM", _DECODER | {"head_dim": 4}),
    "Roberta": ("MaskedLM", _ENCODER),
    "T5": (
        "ConditionalGeneration",
        {
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 8,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 1,
        },
    ),
}


def language_model(name, **settings):
    """Return a model of the architecture, in float64 and in training mode."""
    import transformers

    head, size = ARCHITECTURES.get(name, ("CausalLM", {}))
    config = getattr(transformers, f"{'Gemma3Text' if name == 'Gemma3' else name}Config")(
        vocab_size=WORDS, pad_token_id=1, bos_token_id=2, eos_token_id=3, **size, **settings
    )
    torch.manual_seed(1)
    return getattr(transformers, f"{name}For{head}" if head != "LMHeadModel" else f"{name}{head}")(
        config
    ).double()


@koi.tensor_task
@dataclass
class Padded:
    """What a tokenizer hands out, and the model's own loss."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def loss(self, model):
        return model(
            input_ids=self.input_ids, attention_mask=self.attention_mask, labels=self.labels
        ).loss


class Sentences:
    """Sentences of three to six words, padded; every second task has none that is shorter."""

    padded = False

    def sample(self):
        self.padded = not self.padded
        lengths = torch.randint(3, LENGTH, (3, 1)) if self.padded else torch.tensor(LENGTH)
        mask = (torch.arange(LENGTH) < lengths).long().expand(3, LENGTH)
        words = torch.randint(4, WORDS, (3, LENGTH))
        asked = (mask == 1) & (torch.rand(3, LENGTH) < 0.7)
        asked[:, 1] = True
        return Padded(
            torch.where(mask == 1, words, 1), mask.clone(), torch.where(asked, words, -100)
        )
