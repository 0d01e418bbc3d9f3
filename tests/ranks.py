"""Processes that act as the ranks of a training, started once for many tests."""

import functools
import itertools
import multiprocessing
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import koi.ranks.presence


class Failed(NamedTuple):
    """An exception that a function ended with on a rank."""

    kind: str
    text: str


class Pool:
    """Runs a function on several ranks at once: ``pool(4, function, argument, …)``.

    Each is called as ``function(rank, argument, …)`` and must be importable; what it returns, or
    the exception it raised, comes back in a list.
    """

    def __init__(self, size):
        self._names = itertools.count()
        # one process imports everything, and the ranks are forked off it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_runs", "rank_troubles", "sharded_runs"])
        # port 0: any that is free
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, self._store.port), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.poll(240), "the ranks do not start"
            pipe.recv()

    def __call__(self, size, function, *arguments, timeout=40, patience=30, **options):
        """``patience``: seconds after which a collective times out."""
        name = str(next(self._names))
        for rank, pipe in enumerate(self._pipes[:size]):
            work = functools.partial(function, rank, *arguments, **options)
            pipe.send((work, name, rank, size, patience))
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(timeout), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        return answers

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def serve(pipe, port):
    """Act as a rank again and again."""
    torch.set_num_threads(1)
    koi.ranks.presence.ROLL_CALL = 1.0
    store = dist.TCPStore("localhost", port)
    pipe.send("ready")
    while True:
        function, name, rank, size, patience = pipe.recv()
        torch.manual_seed(100 + rank)  # ranks have nothing in common but what they are given
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=patience),
        )
        try:
            answer = function()
        except BaseException as error:
            notes = getattr(error, "__notes__", [])
            answer = Failed(type(error).__name__, " ".join([str(error), *notes]))
        dist.destroy_process_group()
        pipe.send(answer)
