"""The inner optimizers of the table of cases, made as users make them."""

import torch
from torch.optim import SGD, Adam


def last_two(kind):
    """Make an optimizer over the head alone, the last two tensors."""
    return lambda params, lr: kind(params[-2:], lr=lr)


def two_groups(params, lr):
    """Let the first two tensors learn at a tenth of the rate."""
    return SGD([{"params": params[:2], "lr": lr / 10}, {"params": params[2:]}], lr=lr)


def tensor_rate(params, lr):
    return Adam(params, lr=torch.tensor(lr), foreach=False)


class Clipped(SGD):
    """A subclass with a step of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.clamp_(-0.1, 0.1)
        return super().step(closure)


def hooked(params, lr):
    """SGD with a hook that clips the gradients before each step."""

    def clip(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.clamp_(-0.1, 0.1)

    optimizer = SGD(params, lr=lr)
    optimizer.register_step_pre_hook(clip)
    return optimizer


class Decaying(SGD):
    """Keeps what it has learned of its rate in the parameter group, as Prodigy does."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["k"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] / (1 + group["k"]))
            group["k"] += 1
