"""The listening server: uvicorn's, with a bound on how many connections there are and on how long each may dawdle.

uvicorn waits for good for the rest of a request's head, and for a client that no longer reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from finetune.serving.requests import error

if TYPE_CHECKING:
    from finetune.serving.app import App

CONNECTIONS = 512
FILES_KEPT = 64  # of those that a process may have open: the model's, a listening socket, pipes
HEAD_SECONDS = 10.0  # from a head's first byte to its last; a new connection has as long for both
IDLE_SECONDS = 15  # between two requests; OpenAI's clients hang up after 5
STALL_SECONDS = 30.0  # in which a client takes nothing of an answer that is there for it
LINGER_SECONDS = 2.0  # for a client to read why it was sent away
LOOK_SECONDS = 0.5
REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
UNREADABLE = "this is no HTTP request that can be read, or its head is too long"


def server(app: App, ready: Callable[[], Awaitable[None]], *, grace: int) -> Any:
    """A uvicorn server of an application. `ready` is awaited once it listens; when told to stop it gives answers `grace`
    seconds."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            loop="asyncio",
            http=Connection,
            ws="none",
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=grace,
            callback_notify=ready,
        )
    )


def most_connections() -> int:
    """Half of the files that this process may open at once, since an answer may need another connection to a server
    behind; and no more than CONNECTIONS."""
    try:
        import resource
    except ImportError:
        return CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft < 0 else max(8, min(CONNECTIONS, (soft - FILES_KEPT) // 2))


class Connection(asyncio.Protocol):
    """One client's connection: uvicorn's protocol on h11, looked at twice a second."""

    def __init__(self, **given: Any) -> None:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        self.http = H11Protocol(**given)
        self.http.send_400_response = lambda reason: self._turn_away(400, UNREADABLE)
        self.loop = asyncio.get_running_loop()
        self.open, self.refused = True, False
        self.head_begun: float | None = self.loop.time()
        self.unread, self.taken = 0, self.loop.time()
        self.closing: float | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.http.connection_made(transport)
        if len(self.http.connections) > most_connections():
            self.http.connections.discard(self.http)
            self._turn_away(503, "there are too many connections to this server at once; try again")
        self._look()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        if self.head_begun is None and self._between():
            self.head_begun = self.loop.time()
        before = self.http.cycle
        self.http.data_received(data)
        if self.http.cycle is not before:
            self.head_begun = None

    def eof_received(self) -> None:
        self.http.eof_received()

    def pause_writing(self) -> None:
        self.http.pause_writing()

    def resume_writing(self) -> None:
        self.http.resume_writing()

    def connection_lost(self, problem: Exception | None) -> None:
        self.open = False
        self.http.connection_lost(problem)

    def _between(self) -> bool:
        """Whether no request is being answered; the rest of one that was refused early may still be coming."""
        return self.http.cycle is None or bool(self.http.cycle.response_complete)

    def _look(self) -> None:
        if not self.open:
            return
        now = self.loop.time()
        if self._is_stuck(now):
            self.transport.abort()
        elif not self.refused and self.head_begun is not None and now - self.head_begun > HEAD_SECONDS:
            self._turn_away(408, f"the head of a request did not come within {HEAD_SECONDS:.0f} s")
        self.loop.call_later(LOOK_SECONDS, self._look)

    def _is_stuck(self, now: float) -> bool:
        """Whether the client takes nothing of what was written, or leaves a connection that is over open."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self.unread:
            self.taken = now
        self.unread = unread
        if self.closing is None and (self.refused or self.transport.is_closing()):
            self.closing = now
        lingers = self.closing is not None and now - self.closing > LINGER_SECONDS
        return now - self.taken > STALL_SECONDS or (lingers and (self.refused or now - self.taken > LINGER_SECONDS))

    def _turn_away(self, status: int, why: str) -> None:
        """Answer outside of any request, and hang up: with what is still unread, closing at once would lose the answer."""
        self.refused = True
        body = json.dumps(error(why, status=status)).encode()
        lines = (
            f"HTTP/1.1 {status} {REASONS[status]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        self.transport.write("\r\n".join((*lines, "Connection: close", "", "")).encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
