"""The networks of the paper."""

from __future__ import annotations

from torch import nn

from koi import allowed

# With more scores, the last layer alone would have gigabytes.
MOST_CLASSES = 10**6


def sine_mlp() -> nn.Sequential:
    """Return the net of the sine waves: 1 → 64 → 64 → 1 with tanh, 4,353 parameters.

    >>> sum(p.numel() for p in sine_mlp().parameters())
    4353
    """
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def omniglot_net(num_classes: int, torch_defaults: bool = False) -> nn.Sequential:
    """Return the net of the Omniglot episodes: 1 × 28 × 28 images to ``num_classes`` scores.

    Four blocks of a 3 × 3 convolution with 64 filters and stride 2, BatchNorm and ReLU; then one
    linear layer on 2 × 2 × 64 features (section 6.1 of the paper). Three things differ from
    PyTorch's defaults because the paper's code has them so, and they matter: weights are Glorot
    uniform with zero biases, BatchNorm's ε is 1e-3, and BatchNorm always normalises by the batch
    at hand, for which reason it keeps no running statistics.

    Args:
        num_classes: how many scores.
        torch_defaults: whether initial values and BatchNorm's ε are PyTorch's instead.

    Raises:
        ConfigurationError: arguments that cannot work.

    >>> sum(p.numel() for p in omniglot_net(num_classes=5).parameters())
    113221
    """
    allowed.check(
        num_classes=(num_classes, allowed.count(1, MOST_CLASSES)),
        torch_defaults=(torch_defaults, allowed.truth),
    )
    layers: list[nn.Module] = []
    for num_channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(num_channels, 64, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(64, track_running_stats=False) if torch_defaults else _batch_norm(64),
            nn.ReLU(),
        ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, num_classes))
    return net if torch_defaults else _initialised(net)


def mini_imagenet_net(num_classes: int) -> nn.Sequential:
    """Return the net of the mini-ImageNet episodes: 3 × 84 × 84 images to ``num_classes`` scores.

    Four blocks of a 3 × 3 convolution with 32 filters, BatchNorm, max-pooling of 2 × 2 and ReLU,
    in this order; then one linear layer on 6 × 6 × 32 features (section 6.1 of the paper, and its
    code). Pooling keeps the last row and column of odd sizes, as "same" padding does: 84 → 42 →
    21 → 11 → 6. Initial values and BatchNorm are as in `omniglot_net`.

    Args:
        num_classes: how many scores.

    Raises:
        ConfigurationError: num_classes is no positive whole number.

    >>> sum(p.numel() for p in mini_imagenet_net(num_classes=5).parameters())
    34661
    """
    allowed.check(num_classes=(num_classes, allowed.count(1, MOST_CLASSES)))
    layers: list[nn.Module] = []
    for num_channels in (3, 32, 32, 32):
        layers += [
            nn.Conv2d(num_channels, 32, kernel_size=3, padding=1),
            _batch_norm(32),
            nn.MaxPool2d(kernel_size=2, ceil_mode=True),
            nn.ReLU(),
        ]
    return _initialised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 6 * 6, num_classes)))


def _batch_norm(num_channels: int) -> nn.BatchNorm2d:
    """Return BatchNorm that normalises by the batch at hand, with TensorFlow's default ε."""
    return nn.BatchNorm2d(num_channels, eps=1e-3, track_running_stats=False)


def _initialised(net: nn.Sequential) -> nn.Sequential:
    """Give a net the initial values that TensorFlow gives: Glorot uniform weights, zero biases."""
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return net
