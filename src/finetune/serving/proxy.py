"""Requests handed on to a server in another process on this machine, and its answers back, as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.serving.app import App, Receive, Scope, Send
    from finetune.serving.keeper import Keeper

HEALTH_SECONDS = 5.0  # after which a server that does not say how it is is not well
STREAM, DONE = b"text/event-stream", b"[DONE]"


def application(keeper: Keeper) -> App:
    """The ASGI application that stands for the server behind a keeper's socket. While there is none it answers 503; what
    was being answered when it died gets a 502, or as the last event of a stream the error."""
    clients: dict[Path, Any] = {}  # made in the loop that uses it

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        import httpx2

        body = (await receive())["body"]
        socket = keeper.socket
        if socket is None:
            return await _fail(send, 503, keeper.why)
        begun: bytes | None = None
        try:
            async with _client(clients, socket).stream(
                scope["method"],
                scope["path"],
                content=body,
                headers={"Content-Type": "application/json"},
                timeout=None if scope["method"] == "POST" else HEALTH_SECONDS,
            ) as found:
                begun = found.headers.get("Content-Type", "application/json").encode()
                headers = [(b"content-type", begun)]
                await send({"type": "http.response.start", "status": found.status_code, "headers": headers})
                last = b""
                async for chunk in found.aiter_bytes():
                    last = (last + chunk)[-2 * len(DONE) :]
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if begun.startswith(STREAM) and DONE not in last:  # mlx-lm's has no length: cut off looks like over
                    raise httpx2.RemoteProtocolError("it ended before its answer did")
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx2.TransportError as error:
            why = f"the model's own server does not answer: {error or type(error).__name__}"
            if begun is None:
                await _fail(send, 503 if isinstance(error, httpx2.TimeoutException) else 502, why)
            elif begun.startswith(STREAM):
                event = b"data: " + json.dumps({"error": {"message": why, "type": "server_error"}}).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise

    return answer


def _client(clients: dict[Path, Any], socket: Path) -> Any:
    """The client of a socket; those of sockets before it are of servers that are gone."""
    import httpx2

    if socket not in clients:
        clients.clear()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        transport = httpx2.AsyncHTTPTransport(uds=str(socket), limits=limits)
        clients[socket] = httpx2.AsyncClient(
            base_url="http://model", timeout=None, trust_env=False, transport=transport
        )
    return clients[socket]


async def _fail(send: Send, status: int, why: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"error": why}).encode(), "more_body": False})
