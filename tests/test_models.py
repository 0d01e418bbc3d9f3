"""The networks of the paper: shapes, sizes, order of layers, initial values."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from koi import Koi, SupervisedTask
from koi.models import mini_imagenet_net, omniglot_net, sine_mlp


def num_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("n", [2, 5, 20])
def test_numbers_of_parameters(n):
    first, others = 1 * 64 * 9 + 64, 3 * (64 * 64 * 9 + 64)
    assert num_parameters(omniglot_net(n)) == first + others + 4 * 2 * 64 + 2 * 2 * 64 * n + n
    first, others = 3 * 32 * 9 + 32, 3 * (32 * 32 * 9 + 32)
    assert num_parameters(mini_imagenet_net(n)) == first + others + 4 * 2 * 32 + 6 * 6 * 32 * n + n
    assert num_parameters(sine_mlp()) == 64 + 64 + 64 * 64 + 64 + 64 + 1


def pooled(x):
    """Maxima over squares of 2 × 2 that begin at the corner, with −∞ beyond the edge: "same"."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), value=-math.inf)
    corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


def normalised(x, layer):
    """BatchNorm by the batch at hand."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    variance = centred.square().mean((0, 2, 3), keepdim=True)
    scale, shift = (p.reshape(1, -1, 1, 1) for p in (layer.weight, layer.bias))
    return centred / (variance + 1e-3).sqrt() * scale + shift


def with_random_values(net):
    """A net in which every parameter matters, BatchNorm's and biases too."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def test_the_mini_imagenet_net_step_by_step(float64):
    net = with_random_values(mini_imagenet_net(5))
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in net if isinstance(layer, nn.BatchNorm2d)]
    x = images = torch.rand(3, 3, 84, 84)
    sides = []
    for convolution, norm in zip(convolutions, norms, strict=True):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding="same")
        x = pooled(normalised(x, norm)).clamp(min=0)
        sides.append(x.shape[-1])
    assert sides == [42, 21, 11, 6]
    expected = x.reshape(3, -1) @ net[-1].weight.T + net[-1].bias
    torch.testing.assert_close(net(images), expected)


def test_the_omniglot_net_step_by_step(float64):
    net = with_random_values(omniglot_net(5))
    x = images = torch.rand(3, 1, 28, 28)
    for place in range(0, 12, 3):
        # every second place of the convolution without stride
        x = F.conv2d(x, net[place].weight, net[place].bias, padding=1)[..., ::2, ::2]
        x = normalised(x, net[place + 1]).clamp(min=0)
    expected = x.reshape(3, -1) @ net[-1].weight.T + net[-1].bias
    torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("make", [omniglot_net, mini_imagenet_net])
def test_initial_values_are_glorot_uniform_with_zero_biases(make):
    for layer in make(20):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_out, fan_in, *kernel = layer.weight.shape
            bound = math.sqrt(6 / ((fan_in + fan_out) * math.prod(kernel)))
            largest = layer.weight.abs().max()
            assert largest <= bound
            assert largest > 0.95 * bound  # missed with probability 0.95 ** 576 or less
            assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize("make", [omniglot_net, mini_imagenet_net])
def test_batch_statistics_always(make):
    """In evaluation mode as well, and nothing is remembered from batch to batch."""
    assert list(make(5).buffers()) == []
    net = make(5)
    shape = (1, 28, 28) if make is omniglot_net else (3, 84, 84)
    x, other = torch.rand(2, 4, *shape)
    before = net(x)
    net(other)
    assert torch.equal(net.eval()(x), before)
    assert not torch.allclose(net(torch.cat([x, 9 * other]))[:4], before)


def test_the_mini_imagenet_net_all_at_once_is_one_by_one(float64):
    class Episodes:
        def sample_batch(self, num_tasks):
            images = torch.rand(num_tasks, 4, 3, 84, 84)
            labels = torch.tensor([0, 1, 0, 1]).expand(num_tasks, -1)
            keys = torch.arange(num_tasks)
            return SupervisedTask(images, labels, images, labels, keys, F.cross_entropy)

    learned = []
    for vectorize in (False, True):
        torch.manual_seed(0)
        net = mini_imagenet_net(2)
        koi = Koi(net, 0.01, 2, 1, meta_batch_size=2, vectorize=vectorize, seed=0)
        koi.train(Episodes())
        learned.append(list(net.parameters()))
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
