"""Processes that act as the ranks of a training, started once for many tests."""

import functools
import gc
import itertools
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import koi.ranks.presence
from forked import CONTEXT


class Failed(NamedTuple):
    """An exception that a function ended with on a rank."""

    kind: str
    text: str


NOT_JOINED = Failed("NotJoined", "the ranks found no way to each other")
_TRIES = 3  # gloo's connections were seen to close as they were made, on a busy machine


class Pool:
    """Runs a function on several ranks at once: ``pool(4, function, argument, …)``.

    Each is called as ``function(rank, argument, …)`` and must be importable; what it returns, or
    the exception it raised, comes back in a list.
    """

    def __init__(self, size):
        self._names = itertools.count()
        # port 0: any that is free
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for _ in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(there, self._store.port), daemon=True)
            process.start()
            there.close()  # a rank that dies is then an error here, and nothing to wait for
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __call__(self, size, function, *arguments, patience=300, **options):
        """``patience``: seconds after which a collective times out."""
        for _ in range(_TRIES):
            name = str(next(self._names))
            for rank, pipe in enumerate(self._pipes[:size]):
                work = functools.partial(function, rank, *arguments, **options)
                pipe.send((work, name, rank, size, patience))
            answers = [pipe.recv() for pipe in self._pipes[:size]]
            if not isinstance(answers[0], Failed) or answers[0] != NOT_JOINED:
                return answers
        raise RuntimeError(NOT_JOINED.text)

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def serve(pipe, port):
    """Act as a rank again and again."""
    torch.set_num_threads(1)
    koi.ranks.presence.ROLL_CALL = 1.0
    gc.freeze()
    store = dist.TCPStore("localhost", port)
    pipe.send("ready")
    while True:
        function, name, rank, size, patience = pipe.recv()
        torch.manual_seed(100 + rank)  # ranks have nothing in common but what they are given
        if not joined(store, name, rank, size, patience):
            pipe.send(NOT_JOINED)
            continue
        try:
            answer = function()
        except BaseException as error:
            notes = getattr(error, "__notes__", [])
            answer = Failed(type(error).__name__, " ".join([str(error), *notes]))
        if dist.is_initialized():
            dist.destroy_process_group()
        # a sharded module refers to itself and to its groups, each of which has threads that poll
        gc.collect()
        pipe.send(answer)


def joined(store, name, rank, size, patience):
    """Make the group of all ranks; return whether every one of them could."""
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=patience),
        )
    except RuntimeError:
        store.set(f"{name} {rank}", "no")
    else:
        store.set(f"{name} {rank}", "yes")
    if all(store.get(f"{name} {other}") == b"yes" for other in range(size)):
        return True
    if dist.is_initialized():
        dist.destroy_process_group()
    return False
