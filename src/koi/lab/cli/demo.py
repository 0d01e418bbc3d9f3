"""``koi demo``: the page to play with."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import torch
import typer


def demo(
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Where to serve; 0: any free port.")
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines in; else only this one."),
    ] = "127.0.0.1",
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run's folder or a checkpoint; else the shipped one."),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Whether to open the page in a browser.")
    ] = True,
) -> None:
    """Draw shapes and watch a network learn them from one example each.

    Serves a page on this machine, until Ctrl-C. Draw one example of each of three to five shapes,
    then a new one: the network adapts as you draw and says which it is. Nothing leaves the
    machine.
    """
    from koi.lab.demo import server  # here, since the other commands do without a server
    from koi.lab.demo.classifier import SHIPPED, Classifier

    # Images of 28 × 28 are too small to share: more threads only wait for each other.
    torch.set_num_threads(1)
    classifier = Classifier.load(SHIPPED if checkpoint is None else checkpoint)
    try:
        listening = server.listen(host, port)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot listen at {host}, port {port} ({error.strerror}): choose another port, or 0 "
            "for any free one",
            param_hint="--port",
        ) from error
    with listening:
        address = listening.getsockname()[0]
        url = _url(*listening.getsockname()[:2])
        typer.echo(f"Draw at {url} (Ctrl-C stops)")
        names = [host]
        if not ipaddress.ip_address(address).is_loopback:
            names += [socket.gethostname(), f"{socket.gethostname()}.local"]
            typer.echo(
                f"Others can reach this page: it is served at {address}, to whoever reaches this "
                "machine; leave --host out to keep it to yourself"
            )
        if open_:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):  # the way to stop it, not a failure
            server.serve(classifier, listening, names)


def _url(host: str, port: int) -> str:
    """Return the address to type; a machine's every address is reached as this machine.

    >>> _url("127.0.0.1", 8000), _url("::", 80)
    ('http://127.0.0.1:8000/', 'http://localhost:80/')
    """
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
