"""A door with a made-up engine behind it, listening: in this process, on a free port, without any model."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from finetune.serving import app, bind, connections
from finetune.serving.access import Access, application

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]
ASKED: dict[str, Any] = {"messages": HELLO, "temperature": 0}


@dataclass
class Fake:
    """An engine that trusts what it gets, as the real ones do: whatever the door lets through wrongly makes it fail."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    answer: Callable[[Any, Any], Any] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        try:
            if self.answer is not None:
                return await self.answer(scope, send)
            if scope["path"] == "/health":
                return await say(send, {"status": "ok"})
            await say(send, {"choices": [self.said(json.loads(body))], "usage": {}})
        finally:
            self.left.set()

    def said(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(asked)
        json.dumps(asked, ensure_ascii=False, allow_nan=False).encode()
        _number(asked)
        for token, bias in asked.get("logit_bias", {}).items():
            assert int(token) < 2**40 and bias + 0.0 < 1000
        for tool in asked.get("tools", []):
            assert tool["type"] == "function" and tool["function"]["name"].strip
        stop = asked.get("stop", [])
        text = "".join([stop] if isinstance(stop, str) else stop)
        if "prompt" in asked:
            return {"text": asked["prompt"].upper()[:9] + text, "index": 0}
        for message in asked["messages"]:
            text += message["content"] + message["role"]
            for call in message.get("tool_calls", []):
                made = call["function"]["arguments"]
                text += call["function"]["name"] + "".join(json.loads(made) if isinstance(made, str) else made)
            if "tool_call_id" in message:
                text += message["tool_call_id"]
        text.encode()
        return {"message": {"role": "assistant", "content": asked["messages"][-1]["content"].upper()[:9]}, "index": 0}


def _number(asked: dict[str, Any]) -> None:
    """As C++ does with 32 bits."""
    for key in ("max_tokens", "max_completion_tokens", "seed", "top_k", "n", "n_predict", "n_probs", "top_logprobs"):
        assert -(2**31) < int(asked.get(key) or 0) < 2**32, key
    for key in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty"):
        assert abs(float(asked.get(key) or 0)) < 1e38, key


async def say(send: Any, answer: Any, status: int = 200) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@dataclass(frozen=True)
class Door:
    port: int
    fake: Fake
    server: Any

    def request(
        self, body: Any = None, path: str = "/v1/chat/completions", *, method: str = "", **headers: str | None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON of the answer, its headers) of one request; a header of None is left out."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"Host": f"127.0.0.1:{self.port}", **(JSON if data is not None else {}), **named}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method or ("GET" if data is None else "POST"), path, skip_host=True)
        for name, value in {**sent, **({} if data is None else {"Content-Length": str(len(data))})}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        with connection.getresponse() as answer:
            text = answer.read()
            kept = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if kept.get("content-type") == "application/json" else text, kept

    def is_honest(self) -> bool:
        """Whether an honest request gets its answer."""
        status, answer, _ = self.request(ASKED)
        return (status, answer["choices"][0]["message"]["content"] if status == 200 else None) == (200, "HELLO")

    def raw(self, data: bytes = b"", timeout: float = 20) -> socket.socket:
        """A connection on which some bytes were sent."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        found.sendall(data)
        return found

    def connections(self) -> int:
        return len(self.server.server_state.connections)


@contextmanager
def listening(asked: Access | None = None, fake: Fake | None = None, **more: Any) -> Iterator[Door]:
    fake = fake or Fake()
    ready = threading.Event()

    async def tell() -> None:
        ready.set()

    guarded = application(app.application(more.pop("app", fake), name="town", **more), asked or Access())
    server = connections.server(guarded, tell, grace=1)
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
        thread.start()
        try:
            assert ready.wait(10)
            yield Door(port, fake, server)
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            return found
        if not part:
            return found
        found += part
