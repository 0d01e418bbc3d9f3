"""What keeps the server to those that it is meant for, and free of those that only hold it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# What a Host header has: a name or an address, and a port.
_HOST = re.compile(r"(\[(?P<address>[^\]]*)\]|(?P<name>[^:\[\]]*))(:\d*)?")

HEAD_SECONDS = 5.0  # for a request's line and headers
BODY_SECONDS = 10.0  # for what follows them


class Impatient(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request has begun, wholly, in time.

    Connections are few, and one that says nothing, or a letter now and then, would keep its place.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for another request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class KnownHosts:
    """Refuses requests for a host that the page is not reached by.

    A page elsewhere can let its own name lead to this machine (DNS rebinding), and its scripts
    would then be the demo's as browsers see it. What it cannot be reached by is an address, or a
    name that is this machine's own.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app = app
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http" or self._is_known(Headers(scope=scope).get("host", "")):
            await self.app(scope, receive, send)
            return
        known = ", ".join(sorted(self.names))
        told = f"this page is not reached by the host given: open it by an address, or as {known}"
        await JSONResponse({"error": told}, 421)(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        parts = _HOST.fullmatch(host.lower())
        if parts is None:
            return False
        name = parts["address"] or parts["name"] or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True


class Ending:
    """Lets requests that the server's end cancels be answered, in place of a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if it is cancelled."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] == "http" and not begun:
                answer: Any = JSONResponse({"error": "the server is stopping"}, 503)
                await answer(scope, receive, send)
