"""Arithmetic on lists of tensors, which the meta-update is made of."""

import pytest
import torch
from torch import nn

from koi.phi import arithmetic
from koi.phi.arithmetic import RunningMean
from koi.phi.learned import Learned


def test_interpolation_is_exact_at_its_ends():
    # values of very different size, where start + 1 · (end − start) would lose the end
    start, end = torch.tensor([1e8, 1e-8, -3.0]), torch.tensor([1e-8, 1e8, 0.1])
    for fraction, expected in [(0.0, start), (1.0, end)]:
        moved = start.clone()
        arithmetic.interpolate_([moved], [end], fraction)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("fraction", [0.25, 0.75, 2.0])
def test_interpolation(fraction):
    moved = torch.tensor([1.0, -2.0])
    arithmetic.interpolate_([moved], [torch.tensor([5.0, 2.0])], fraction)
    assert moved.tolist() == [1 + 4 * fraction, -2 + 4 * fraction]


def test_norm_is_over_all_tensors_together():
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [0.0]]), torch.tensor(12.0)]
    assert arithmetic.norm(tensors).item() == 13


class TestRunningMean:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_mean(self, count, dtype):
        tasks = [[torch.randn(3, 2).to(dtype), torch.randn(()).to(dtype)] for _ in range(count)]
        kept = [[t.clone() for t in task] for task in tasks]
        mean = RunningMean()
        for task in tasks:
            mean.add(task)
        expected = [torch.stack(ts).double().mean(0).to(dtype) for ts in zip(*kept, strict=True)]
        torch.testing.assert_close(mean.value(), expected)
        # what was added stays as it was
        for task, before in zip(tasks, kept, strict=True):
            torch.testing.assert_close(task, before, rtol=0, atol=0)

    def test_what_was_added_may_change_afterwards(self):
        tensor, mean = torch.tensor([1.0]), RunningMean()
        for value in (1.0, 5.0):
            mean.add([tensor.fill_(value)])
        assert mean.value()[0].item() == 3

    def test_half_precision_is_summed_in_single(self):
        """256 + 1 is 256 in bfloat16; the mean of many would stand still."""
        mean = RunningMean()
        for value in [256.0] + [1.0] * 255:
            mean.add([torch.tensor(value, dtype=torch.bfloat16)])
        expected = torch.tensor((256 + 255) / 256, dtype=torch.bfloat16)
        assert mean.value()[0] == expected

    def test_weighted(self):
        mean = RunningMean()
        mean.add([torch.tensor(1.0)], 3)
        mean.add([torch.tensor(5.0)], 1)
        assert mean.value()[0].item() == 2

    def test_empty(self):
        assert RunningMean().value() == []
        mean = RunningMean()
        mean.add([])
        mean.add([])
        assert mean.value() == []


def test_what_of_a_module_is_learned():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    model[2].weight = model[0].weight
    learned = Learned.of(model)
    assert learned.params == ("0.weight", "1.weight", "1.bias", "2.bias")
    assert learned.buffers == ("1.running_mean", "1.running_var")
    assert learned.constants == ("1.num_batches_tracked",)
    assert all(
        a is b
        for a, b in zip(
            learned.params_of(model),
            [model[0].weight, model[1].weight, model[1].bias, model[2].bias],
            strict=True,
        )
    )
