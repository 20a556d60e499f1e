"""Requests handed on to a server in another process on this machine, and its answers back, as they come."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.serving.door import App, Receive, Scope, Send


def application(base: str) -> App:
    """The ASGI application that stands for the server at `base`."""
    import httpx2

    clients: list[Any] = []  # made in the loop that uses it

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if not clients:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            clients.append(httpx2.AsyncClient(base_url=base, timeout=None, trust_env=False, limits=limits))
        body = (await receive())["body"]
        begun = False
        try:
            async with clients[0].stream(
                scope["method"], scope["path"], content=body, headers={"Content-Type": "application/json"}
            ) as found:
                kind = found.headers.get("Content-Type", "application/json").encode()
                await send(
                    {"type": "http.response.start", "status": found.status_code, "headers": [(b"content-type", kind)]}
                )
                begun = True
                async for chunk in found.aiter_bytes():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx2.TransportError as error:
            if begun:
                raise
            text = json.dumps({"error": f"the model's own server does not answer: {error}"}).encode()
            await send({"type": "http.response.start", "status": 502, "headers": []})
            await send({"type": "http.response.body", "body": text, "more_body": False})

    return answer
