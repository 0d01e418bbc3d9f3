"""Optimizers of one's own that the tests share, and how an engine would bind them."""

import torch

from koi.inner.base import InnerLoop
from koi.inner.optimizers.recognition import update_rule
from koi.inner.optimizers.rules import layout_of, make_optimizer
from koi.phi.learned import Learned

SHAPES = [(3, 2), (2,), ()]


class Toy(torch.optim.Optimizer):
    """Steps by −lr g, and does at every step what ``after`` says with its group and a parameter."""

    def __init__(self, params, lr, after=lambda group, state, grad: None, **entries):
        super().__init__(params, {"lr": lr, **entries})
        self.after = after

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad)
                    self.after(group, self.state[param], param.grad)


class Prodigal(torch.optim.Optimizer):
    """As Prodigy it has in its group d, which grows with a norm over all parameters, and k."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "d": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
            group["d"] = max(group["d"], 0.3 * norm)
            group["k"] += 1
            for param in group["params"]:
                param.sub_(group["lr"] * group["d"] / group["k"] ** 0.5 * param.grad)


def start_params():
    return [torch.randn(shape) for shape in SHAPES]


def gradients(num_steps):
    return [[torch.randn(shape) for shape in SHAPES] for _ in range(num_steps)]


def leaves(values):
    return [value.clone().requires_grad_() for value in values]


def inner_of(factory, params):
    optimizer = make_optimizer(factory, params, 0.1)
    rule, layout = update_rule(optimizer, params), layout_of(optimizer, params)
    return InnerLoop(Learned((), (), ()), "reptile", factory, 0.1, rule, layout=layout)


def noisy(params, lr):
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            for param in params:
                param.grad = param.grad + torch.randn_like(param)
            return super().step(closure)

    return Noisy(params, lr)
