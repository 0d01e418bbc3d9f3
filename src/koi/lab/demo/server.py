"""A thin server: the page, and one address that adapts and answers."""

from __future__ import annotations

import socket
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from koi.lab.demo import guards, strokes
from koi.lab.demo.classifier import MAX_CLASSES, MIN_CLASSES, Classifier
from koi.lab.demo.messages import (
    MAX_BYTES,
    MAX_POINTS,
    MAX_STEPS,
    MAX_STROKES,
    Question,
    explanation,
)

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    # Nothing but the page's own files, and nothing inline.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MAX_CONNECTIONS = 64
_PATIENCE = 1  # seconds that answers under way are waited for at the end


def application(classifier: Classifier, names: Collection[str] = ()) -> Starlette:
    """Return the demo as an ASGI application.

    ``POST /answer`` takes a `Question` as JSON. What comes back has ``losses``, ``probabilities``
    and ``known``, as `Answer`, and ``images``: of the examples and then of the query what the
    network sees, each 784 characters, row by row, "1" for ink. Anything else than a question gets
    a status from 400 to 499 and ``{"error": one sentence}``. ``GET /limits`` says what may be
    asked, and of what network. A request for a host that is no address, and neither localhost nor
    one of ``names``, is refused.
    """
    # Answers are made one after the other: torch's global generators are set while one is made.
    one_at_a_time = anyio.CapacityLimiter(1)
    num_classes = min(MAX_CLASSES, classifier.num_outputs)

    async def answer(request: Request) -> JSONResponse:
        question = _question(await _body(request), num_classes)
        work = partial(_answer, classifier, question)
        return JSONResponse(await anyio.to_thread.run_sync(work, limiter=one_at_a_time))

    async def limits(request: Request) -> JSONResponse:  # noqa: ARG001 (Starlette passes it)
        return JSONResponse(
            {
                "min_classes": MIN_CLASSES,
                "max_classes": num_classes,
                "max_steps": MAX_STEPS,
                "max_strokes": MAX_STROKES,
                "max_points": MAX_POINTS,
                "num_tasks": classifier.num_tasks,
                "algorithm": classifier.algorithm,
                "optimizer": classifier.optimizer,
            }
        )

    return Starlette(
        routes=[
            Route("/answer", answer, methods=["POST"]),
            Route("/limits", limits),
            Mount("/", StaticFiles(directory=_STATIC, html=True)),
        ],
        middleware=[Middleware(_WithHeaders), Middleware(guards.KnownHosts, names=names)],
        exception_handlers={HTTPException: _refused},
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that already listens, so that a browser can be sent there.

    Raises:
        OSError: the address is in use, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def serve(classifier: Classifier, listening: socket.socket, names: Collection[str] = ()) -> None:
    """Answer until Ctrl-C or SIGTERM, under these names of the machine."""
    # The first adaptation is slow; better that nobody waits for it.
    blank = torch.zeros(MIN_CLASSES, 1, strokes.IMAGE_SIZE, strokes.IMAGE_SIZE)
    classifier.answer(blank, blank[0], 1, "learned")
    config = uvicorn.Config(
        guards.Ending(application(classifier, names)),
        http=guards.Impatient,
        log_level="warning",
        access_log=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_PATIENCE,
    )
    uvicorn.Server(config).run(sockets=[listening])


async def _body(request: Request) -> bytes:
    """Return the body, of which no more is read than is allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the question is of type {kind or 'unknown'}: send JSON")
    body, close = bytearray(), {"Connection": "close"}
    try:
        with anyio.fail_after(guards.BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    told = f"the question is too large: at most {MAX_BYTES} bytes"
                    raise HTTPException(413, told, close)
    except TimeoutError as error:
        raise HTTPException(408, "the question did not arrive in time", close) from error
    except ClientDisconnect as error:  # whom nobody can tell
        raise HTTPException(400, "the question was not sent to its end", close) from error
    return bytes(body)


def _question(body: bytes, num_classes: int) -> Question:
    try:
        question = Question.model_validate_json(body)
    except ValidationError as error:
        is_json = all(mistake["type"] != "json_invalid" for mistake in error.errors())
        raise HTTPException(422 if is_json else 400, explanation(error)) from error
    if len(question.examples) > num_classes:
        raise HTTPException(
            422,
            f"examples: {len(question.examples)} were given, and this network tells at most "
            f"{num_classes} classes apart",
        )
    return question


def _answer(classifier: Classifier, question: Question) -> dict[str, Any]:
    images = torch.stack([strokes.image(drawing) for drawing in question.examples])
    query = None if question.query is None else strokes.image(question.query)
    answer = classifier.answer(images, query, question.num_steps, question.initialisation)
    seen = [*images, *([] if query is None else [query])]
    return {
        "losses": answer.losses,
        "probabilities": answer.probabilities,
        "known": answer.known,
        "images": ["".join("1" if ink else "0" for ink in _ink(image)) for image in seen],
    }


def _ink(image: torch.Tensor) -> list[bool]:
    flags: list[bool] = (image == strokes.INK).flatten().tolist()
    return flags


async def _refused(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class _WithHeaders:
    """Adds the same headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)
