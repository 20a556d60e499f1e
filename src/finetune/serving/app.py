"""What stands before every server: the same few routes, checks and errors, whichever of them answers.

transformers' server says 500 to most malformed requests, llama.cpp's answers for any model, mlx-lm's fetches the one that a
request names. So a request goes through here first; what is well-formed goes on to the server, and its answer back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finetune.serving.requests import Refused, checked, error, unknown_model

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST = 8 * 2**20  # bytes of a request: more than any context holds
HELD = 16 * LONGEST  # bytes of all requests that are being read at a time
BODY_SECONDS = 20.0  # for a body to arrive, all in all
GRACE_SECONDS = 3  # for an answer that is being written when the server is told to stop
JSON = [(b"content-type", b"application/json")]  # whatever the client called its body, it was read as that
TOO_LONG = f"the request is longer than {LONGEST // 2**20} MiB"
UNREAD = (408, 413, 503)
FAILED = "the server failed at this request; what it wrote on stderr says why"
logger = logging.getLogger("finetune.serving")


def application(
    app: App,
    *,
    name: str,
    system: str | None = None,
    ignored: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> App:
    """The ASGI application with `/health`, `/v1/models`, `/v1/completions` and `/v1/chat/completions` before `app`.

    `system` and `ignored` as in `requests.checked`; `stopping` tells whether the server was told to stop.
    """
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "finetune"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise unknown_model(request.path_params["name"], name)
        return JSONResponse(entry)

    async def health(request: Request) -> Answer:
        return Answer(app, b"", stopping)

    bodies = Bodies()

    async def answer(request: Request) -> Answer:
        chat = request.url.path == "/v1/chat/completions"
        body = checked(await bodies.read(request), chat=chat, name=name, system=system, ignored=ignored)
        return Answer(app, json.dumps(body).encode(), stopping)

    async def refused(request: Request, problem: Any) -> Response:
        # What is left of a body that was given up on is not read as the next request.
        headers = {"Connection": "close"} if problem.status in UNREAD else {}
        return JSONResponse(problem.error, problem.status, headers)

    async def failed(request: Request, problem: Any) -> Response:
        return JSONResponse(error(FAILED, status=500), 500)

    async def no_route(request: Request, problem: Any) -> Response:
        message = (
            f"{request.method} {request.url.path[:200]}: {problem.detail}. There are GET /health, GET /v1/models, "
        )
        message += "POST /v1/completions, POST /v1/chat/completions"
        return JSONResponse(error(message, status=problem.status_code), problem.status_code, problem.headers)

    async def left(request: Request, problem: Any) -> Response:
        return Response(status_code=400)  # nobody reads it

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", answer, methods=["POST"]),
        Route("/v1/chat/completions", answer, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: refused, HTTPException: no_route, ClientDisconnect: left, Exception: failed}
    guarded: App = Starlette(routes=routes, exception_handlers=handlers)
    return guarded


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_over(stopping: Callable[[], bool]) -> None:
    while not stopping():
        await asyncio.sleep(0.1)
    await asyncio.sleep(GRACE_SECONDS)


class Bodies:
    """The bodies that are being read: each in bounded time, all together in bounded memory."""

    def __init__(self) -> None:
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """A request's body. Raises Refused."""
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            raise Refused("a request has a Content-Length or a Transfer-Encoding, not both")
        if not length.isdecimal() or int(length[:20]) > LONGEST:
            raise Refused(TOO_LONG, status=413)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > LONGEST:
                        raise Refused(TOO_LONG, status=413)
                    if self.held > HELD:
                        raise Refused("this server is reading too many long requests at once; try again", status=503)
        except TimeoutError:
            raise Refused(f"the body did not come within {BODY_SECONDS:.0f} s", status=408) from None
        finally:
            self.held -= len(body)
        return bytes(body)


class Answer:
    """The answer of the server behind, as it comes; an error in the words of OpenAI's API. It is called off when the
    client leaves, and when it is not finished a while after the server was told to stop."""

    def __init__(self, app: App, body: bytes, stopping: Callable[[], bool]) -> None:
        self.app, self.request_body, self.stopping = app, body, stopping
        self.status = 0  # until the answer begins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._answer(scope, send))
        ends = [asyncio.ensure_future(each) for each in (_until_left(receive), _until_over(self.stopping))]
        try:
            await asyncio.wait({work, *ends}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.gather(work, *ends, return_exceptions=True)
        if not self.status:
            await JSONResponse(error("the server is stopping", status=503), 503)(scope, receive, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        asked = False
        kept = bytearray()

        async def read() -> MutableMapping[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # until this task is cancelled
            asked = True
            return {"type": "http.request", "body": self.request_body, "more_body": False}

        async def write(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            if self.status < 400:
                await send(message)
            else:
                kept.extend(message.get("body", b""))

        try:
            await self.app({**scope, "headers": JSON}, read, write)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            self.status = self.status or 500
        if self.status >= 400:
            await JSONResponse(_as_openai(bytes(kept), self.status), self.status)(scope, read, send)


def _as_openai(body: bytes, status: int) -> dict[str, Any]:
    """An error of any of the servers: `{"error": {"message": ...}}`, `{"error": "..."}` or `{"detail": "..."}`."""
    try:
        value = json.loads(body)
        found = value.get("error", value.get("detail"))
    except (ValueError, AttributeError):
        found = None
    message = found.get("message") if isinstance(found, dict) else found
    if not message:
        return error(FAILED, status=status)
    text = str(message).encode("utf-8", "replace").decode("utf-8")
    code = "context_length_exceeded" if "context size" in text else None
    return error(text, status=status, code=code)
