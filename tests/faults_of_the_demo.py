"""Connections to the demo: silent, slow, broken off, or meant for another; see faults.py."""

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from unittest import mock

import torch
import uvicorn

from koi import Koi
from koi.lab.demo import guards
from koi.lab.demo.classifier import Classifier
from koi.lab.demo.server import listen, serve
from koi.models import omniglot_net

_draw = random.SystemRandom()
_ADDRESS = "127.0.0.1"
_GOOD = b"GET /limits HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_QUESTION = json.dumps({"examples": [[[[0.1, 0.1], [0.9, 0.2]]]] * 3, "num_steps": 1}).encode()
_HOSTS = (b"evil.example", b"", b"[::1].evil", b"\xff", b"localhost.evil", b"a" * 70_000, b"@")
_SECONDS = 30  # after which an honest client gives up, on a machine that has much else to do


@contextlib.contextmanager
def _served() -> Iterator[int]:
    """Yield the port of a server with little patience."""
    made: list[uvicorn.Server] = []
    listening = listen(_ADDRESS, 0)
    keep = lambda server, sockets: made.append(server)  # noqa: E731
    with mock.patch.object(uvicorn.Server, "run", keep):
        serve(Classifier(Koi(omniglot_net(5), 1e-3)), listening)
    seconds = mock.patch.multiple(guards, HEAD_SECONDS=0.3, BODY_SECONDS=0.3)
    with seconds:
        thread = threading.Thread(target=made[0].run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            made[0].should_exit = True
            thread.join()
            listening.close()


def _asked(port: int, content: bytes) -> bytes:
    with socket.create_connection((_ADDRESS, port), timeout=_SECONDS) as connection:
        connection.sendall(content)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def _is_answered(port: int) -> bool:
    """Return whether an honest client is answered, once those that only hold have been closed."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if b" 200 OK" in _asked(port, _GOOD):
                return True
        time.sleep(0.05)
    return False


def _question(body: bytes, length: int, host: bytes = b"localhost") -> bytes:
    head = b"POST /answer HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head + b"Host: %b\r\nContent-Length: %d\r\n\r\n" % (host, length) + body


def _hostile() -> tuple[bytes, bool]:
    """Return what is sent, and whether the connection is left at once."""
    cut = _QUESTION[: _draw.randrange(len(_QUESTION))]
    changed = bytearray(_QUESTION)
    changed[_draw.randrange(len(changed))] = _draw.randrange(256)
    sent = _draw.choice(
        (
            b"",
            _GOOD[: _draw.randrange(len(_GOOD))],
            _question(cut, len(_QUESTION)),
            _question(bytes(changed), len(changed)),
            _question(_QUESTION, 2**40),
            _question(_QUESTION, len(_QUESTION), _draw.choice(_HOSTS)),
            b"GET /limits HTTP/1.1\r\nHost: " + _draw.choice(_HOSTS) + b"\r\n\r\n",
            _draw.randbytes(_draw.randrange(1, 3000)),
        )
    )
    return sent, _draw.random() < 0.3


def hostile_connections(times: int) -> int:
    """Many at once; an honest client is answered all the same, and no error of Python's is told."""
    lost, told = 0, _Told()
    torch.set_num_threads(1)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addHandler(told)
    with _served() as port:
        for first in range(0, times, 40):
            with contextlib.ExitStack() as stack:
                for _ in range(min(40, times - first)):
                    sent, leaves = _hostile()
                    with contextlib.suppress(OSError):  # the server may have closed it by then
                        made = socket.create_connection((_ADDRESS, port), timeout=_SECONDS)
                        stack.enter_context(made)
                        made.sendall(sent)
                        if leaves:
                            made.close()
                lost += not _is_answered(port)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).removeHandler(told)
    return lost + told.count


class _Told(logging.Handler):
    """Counts errors with a traceback, and whatever the server calls an error."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.exc_info is not None or "Traceback" in record.getMessage()
