"""The models of the table of cases: small modules, unmodified, as users write them."""

import warnings
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


def mlp():
    """3 → 4 → 2 with tanh."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def conv():
    """A convolution, without the bias that BatchNorm would cancel, with running statistics."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def around(*layers):
    """3 → 4, the layers, → 2; no bias in front of what may be a normalisation."""
    return nn.Sequential(nn.Linear(3, 4, bias=False), *layers, nn.Linear(4, 2))


def wide(*layers):
    """The same with two channels of two numbers."""
    return around(nn.Unflatten(1, (2, 2)), *layers, nn.Flatten())


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Encoder(nn.Module):
    """A transformer layer and a head."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            3, 1, 2, dropout=0.0, activation="gelu", batch_first=True
        )
        # the biases of queries, keys and values are one parameter; the gradient of the keys' is
        # zero but for rounding, of which Adam would make full steps
        self.layer.self_attn.in_proj_bias.requires_grad_(False)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """Reads three steps of two numbers."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.cells = kind(2, 2, batch_first=True, **settings)
        width = settings.get("proj_size", 2) * (2 if settings.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Padded(nn.Module):
    """Words, of which number 0 fills sentences up."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(2, 2)

    def forward(self, ids):
        words = self.embedding(ids)
        return self.head((words if words.dim() == 2 else words.mean(1)).tanh())


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outward.weight = self.inward.weight

    def forward(self, x):
        return self.outward(self.inward(x).tanh())[:, :2]


class Unused(nn.Linear):
    """A parameter that no loss depends on."""

    def __init__(self):
        super().__init__(3, 2)
        self.unused = nn.Parameter(torch.ones(3))


class HeldInTuple(nn.Module):
    """A weight that is also kept where no name leads to it."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(3, 3)
        self.shared = (self.inward.weight,)

    def forward(self, x):
        return (self.inward(x).tanh() @ self.shared[0])[:, :2]


class Closing(nn.Module):
    """An attribute closes over the module, which a deep copy of the module does not copy."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 4), nn.Linear(4, 2)
        self.read = lambda x: self.inward(x).tanh()

    def forward(self, x):
        return self.outward(self.read(x))


class Average(nn.Module):
    """Subtracts a moving average of its inputs, kept in a buffer."""

    def __init__(self, assigned):
        super().__init__()
        self.linear, self.assigned = nn.Linear(3, 2), assigned
        self.register_buffer("ema", torch.zeros(3))

    def forward(self, x):
        if self.assigned:
            self.ema = 0.9 * self.ema + 0.1 * x.mean(0).detach()
        else:
            self.ema.mul_(0.9).add_(0.1 * x.mean(0).detach())
        return self.linear(x - self.ema)


class Spectrum(nn.Module):
    """A moving average of a transform: a complex buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.complex128))

    def forward(self, x):
        transformed = torch.fft.fft(x)
        self.mean.lerp_(transformed.mean(0).detach(), 0.1)
        return self.linear((transformed - self.mean).abs())


class Counter(nn.Module):
    """Counts its calls in an integer buffer, of which a rate is made."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) / (1 + 0.1 * self.calls)


class ActNorm(nn.Module):
    """Takes scale and shift from its first batch; a flag says that it has."""

    def __init__(self):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if not self.ready:
            with torch.no_grad():
                self.log_scale.copy_(-x.std(0).log())
                self.shift.copy_(-(x.mean(0) * self.log_scale.exp()))
                self.ready.fill_(True)
        return x * self.log_scale.exp() + self.shift


class MaxNorm(nn.Module):
    """Keeps the rows of a weight no longer than a half, by changing it in forward."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            lengths = self.inward.weight.norm(dim=1, keepdim=True)
            self.inward.weight.mul_((0.5 / lengths).clamp(max=1))
        return self.outward(self.inward(x).tanh())


class Masked(nn.Module):
    """Attention to what came before: a buffer of zeros and −∞."""

    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3).double())

    def forward(self, x):
        scores = self.query(x) @ x.transpose(1, 2) + self.mask
        return self.head((scores.softmax(2) @ x).mean(1))


class Complex(nn.Module):
    """A complex weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))

    def forward(self, x):
        product = x.to(self.weight.dtype) @ self.weight
        return product.real + product.imag.tanh()


class Hidden(nn.Module):
    """A recurrent state in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(5, 2), nn.Linear(2, 2)
        self.state = torch.zeros(6, 2)

    def forward(self, x):
        state = self.cell(torch.cat([x, self.state[: len(x)]], 1)).tanh()
        self.state = F.pad(state.detach(), (0, 0, 0, 6 - len(x)))
        return self.head(state)


class Calls(nn.Module):
    """Counts its calls in a plain attribute, of which a rate is made."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) / (1 + 0.1 * self.calls)


class Checkpointed(nn.Module):
    """Computes its middle again instead of keeping it."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant
        self.middle = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.layers[:2](x)
        hidden = checkpoint(self._block, hidden, use_reentrant=self.reentrant)
        return self.layers[2](hidden)

    def _block(self, x):
        return self.middle(x).tanh()


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.form(x, x.flip(1))


def scripted():
    """A part that TorchScript has compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class Bert(nn.Module):
    """With ``masked`` attention leaves the padding out, otherwise it is read as any word."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked
        import transformers

        config = transformers.BertConfig(
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=4,
            vocab_size=9,
            max_position_embeddings=6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert, self.head = transformers.BertModel(config).double(), nn.Linear(4, 2)

    def forward(self, ids):
        mask = (ids != 0).long() if self.masked else None
        return self.head(self.bert(ids, attention_mask=mask).last_hidden_state.mean(1))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=4,
            vocab_size=9,
            max_position_embeddings=6,
            pad_token_id=0,
            use_cache=False,
        )
        self.llama, self.head = transformers.LlamaModel(config).double(), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.llama(ids).last_hidden_state[:, -1])


def adapted(kind, **settings):
    """A network whose weights are frozen, with adapters that learn."""
    import peft

    config = getattr(peft, kind)(target_modules=["0", "2"], r=2, **settings)
    return peft.get_peft_model(mlp(), config).double()


lora = partial(adapted, "LoraConfig", lora_alpha=1, init_lora_weights=False)
loha = partial(adapted, "LoHaConfig", alpha=1, init_weights=False)
lokr = partial(adapted, "LoKrConfig", alpha=1, init_weights=False)


lstm = partial(Recurrent, nn.LSTM)
gru = partial(Recurrent, nn.GRU)
rnn = partial(Recurrent, nn.RNN)


def embedding():
    return Padded(nn.Embedding(5, 2, padding_idx=0))


def bag():
    return Padded(nn.EmbeddingBag(5, 2, padding_idx=0))


class Tempered(nn.Module):
    """Has a parameter that is one number, without a dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.temperature = mlp(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.temperature * self.body(x)


class Scaling(nn.Module):
    """Divides by a running size, which each forward changes in place."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("size", torch.tensor(1.0))

    def forward(self, x):
        self.size.mul_(0.9).add_(0.1 * x.detach().square().mean())
        return self.body(x) / self.size


def with_weight_norm():
    return around(nn.Tanh(), weight_norm(nn.Linear(4, 4)))


def with_spectral_norm():
    return around(nn.Tanh(), spectral_norm(nn.Linear(4, 4)))


def with_orthogonal():
    return around(nn.Tanh(), orthogonal(nn.Linear(4, 4)))


def instance_norm():
    return wide(nn.InstanceNorm1d(2, affine=True, track_running_stats=True))
