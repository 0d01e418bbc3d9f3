"""What torch's fully_shard cannot do, shown without Koi: python benchmarks/fsdp_limits.py.

It has no copy, no gradient but by backward, none of second order, and it takes no other weights
than its own: of zeros in their place (the last line) no output would be other than zero.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net, x = fully_shard(torch.nn.Linear(2, 2)), torch.ones(3, 2)
params, weights = list(net.parameters()), {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}


def second_order():
    net(x).square().sum().backward(create_graph=True)
    return params[0].grad.sum().backward()


attempts = {
    "a copy": lambda: copy.deepcopy(net),
    "torch.autograd.grad": lambda: torch.autograd.grad(net(x).sum(), params),
    "the gradient of a gradient": second_order,
    "other weights": lambda: torch.func.functional_call(net, weights, x).count_nonzero().item(),
}
for what, attempt in attempts.items():
    try:
        print(f"{what}: {attempt()}")
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}")
    net.reshard()
dist.destroy_process_group()
