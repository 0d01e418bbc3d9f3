"""Peak memory of a meta-iteration as the meta-batch grows, each size in a process of its own.

python benchmarks/memory.py FORM TASKS CHUNK_SIZE DEVICE prints bytes: the peak during training
minus what was in use before the meta-batch was drawn.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F
from workloads import OMNIGLOT, RandomImages, placed, training

from koi.models import omniglot_net


def peak(form: str, num_tasks: int, chunk_size: int | None = None, device: str = "cpu") -> int:
    """Measure in a fresh process, so that no earlier run's memory is in the way."""
    command = [sys.executable, __file__, form, str(num_tasks), str(chunk_size or 0), device]
    # Freed memory goes back to the system at once instead of being kept for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure(form: str, num_tasks: int, chunk_size: int | None, device: str) -> int:
    koi = OMNIGLOT.koi(form, device, num_tasks, chunk_size=chunk_size)
    train = training(koi, placed(RandomImages(), device)).run
    torch.set_num_threads(1)
    if koi.compile:
        train(1)  # the compiler's own memory is not the run's
    reset_peak(device)
    before = in_use(device)
    train(2)
    return highest(device) - before


def reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def in_use(device: str) -> int:
    return status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def highest(device: str) -> int:
    return status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def status(name: str) -> int:
    """A number of bytes from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return 1024 * int(values[name].split()[0])


def needed() -> dict[str, int]:
    """Bytes that one task cannot do without: what an inner step of torch's own would hold."""
    model = omniglot_net(5)
    params = sum(p.nbytes for p in model.parameters())
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    task = RandomImages().sample_batch(1)
    inputs, targets = task.support_inputs[0, :10], task.support_targets[0, :10]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(inputs), targets)
    for param in model.parameters():
        saved.pop(param.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    return {"parameters": params, "optimizer state": 2 * params, "activations": sum(saved.values())}


def slope(peaks: Mapping[int, int]) -> float:
    """Bytes for each task: the least-squares line through the sizes and their peaks."""
    sizes = torch.tensor(list(peaks), dtype=torch.float64)
    values = torch.tensor(list(peaks.values()), dtype=torch.float64)
    offsets = sizes - sizes.mean()
    return float((offsets * values).sum() / offsets.square().sum())


if __name__ == "__main__":
    form, num_tasks, chunk_size, device = sys.argv[1:]
    print(measure(form, int(num_tasks), int(chunk_size) or None, device))
