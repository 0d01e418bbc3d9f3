"""The networks of the paper."""

from __future__ import annotations

from torch import nn


def sine_mlp() -> nn.Sequential:
    """Return the net of the sine waves: 1 → 64 → 64 → 1 with tanh, 4,353 parameters.

    >>> sum(p.numel() for p in sine_mlp().parameters())
    4353
    """
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def omniglot_net(num_classes: int) -> nn.Sequential:
    """Return the net of the Omniglot episodes: 1 × 28 × 28 images to ``num_classes`` scores.

    Four blocks of a 3 × 3 convolution with 64 filters and stride 2, BatchNorm and ReLU; then one
    linear layer on 2 × 2 × 64 features (section 6.1 of the paper). Three things differ from
    PyTorch's defaults because the paper's code has them so, and they matter: weights are Glorot
    uniform with zero biases, BatchNorm's ε is 1e-3, and BatchNorm always normalises by the batch
    at hand, for which reason it keeps no running statistics.

    >>> sum(p.numel() for p in omniglot_net(num_classes=5).parameters())
    113221
    """
    net = nn.Sequential(
        *_conv_block(1),
        *_conv_block(64),
        *_conv_block(64),
        *_conv_block(64),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return net


def _conv_block(num_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(num_channels, 64, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(64, eps=1e-3, track_running_stats=False),
        nn.ReLU(),
    )
