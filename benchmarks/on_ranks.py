"""Processes that act as the ranks of a benchmark, each on one thread."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def answers(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Let so many ranks, new ones, call a function; return what each answers.

    Raises:
        EOFError: a rank has ended without an answer; it says why on its standard error.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        given = there, store.port, rank, size, function, arguments
        processes.append(context.Process(target=_be, args=given, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return found


def _be(
    pipe: Connection,
    port: int,
    rank: int,
    size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    pipe.send(function(*arguments))
    dist.destroy_process_group()
