"""How a process comes to be one of several that train together."""

from __future__ import annotations

import atexit
import os
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from koi.errors import RankError
from koi.ranks.presence import gathered, patience

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(device: torch.device) -> bool:
    """Return whether this process is one of several, making the group that torchrun asks for."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not all(name in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return False
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=patience())))
        except dist.DistError as error:
            raise RankError(
                f"the ranks cannot find each other ({error}): has one ended before koi.train?"
            ) from error
        dist.init_process_group(
            # by itself torch takes NCCL for the GPU, gloo for what is on the CPU
            "gloo" if device.type == "cpu" else None,
            store=of_this_attempt(store, rank, size),
            rank=rank,
            world_size=size,
        )
        atexit.register(_leave)
    return dist.get_world_size() > 1


def of_this_attempt(store: Store, rank: int, size: int) -> Store:
    """Return a part of ``store`` that is new to all ranks.

    torchrun's store outlives its restarts, and processes would find in it the addresses of those
    that have ended (pytorch/pytorch#135712). So each rank says hello under a name that was never
    used, which only a rank 0 that is alive can answer, and confirms what it was told.
    """
    from torch.distributed.distributed_c10d import PrefixStore, default_pg_timeout

    name = f"koi/{uuid.uuid4()}"
    if rank > 0:
        store.set(f"koi/hello/{rank}", name)
        gathered(store, lambda _: name, [0], lambda _: None)
        name = store.get(name).decode()
        store.set(f"{name}/{rank}", "")

    def answer(other: int) -> None:
        if store.check([f"koi/hello/{other}"]):  # of this attempt, or of an earlier one
            store.set(store.get(f"koi/hello/{other}").decode(), name)

    gathered(store, lambda other: f"{name}/{other}", range(1, size if rank == 0 else 1), answer)
    store.set_timeout(default_pg_timeout)
    return PrefixStore(name, store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
