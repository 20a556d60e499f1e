"""Ollama's HTTP API, as much of it as the backend uses: https://docs.ollama.com/api

Over the standard library: the official Python client has no way to ask for a rendered prompt.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.core.errors import MissingError, StageError, UsageError, first_line

PORT = 11434
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0  # loading a model and answering
DELETE_SECONDS = 30.0
HINT = (
    "Install Ollama from https://ollama.com/download and start it with: ollama serve "
    "(OLLAMA_HOST names a server elsewhere)"
)


class Refused(StageError):
    """The server said no. `status` is HTTP's, `reason` the server's own words."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Client:
    """One server. `host` is written as in OLLAMA_HOST, which is read where none is given."""

    def __init__(self, host: str | None = None, *, timeout: float = ANSWER_SECONDS) -> None:
        self.scheme, self.host, self.port, self.prefix = _address(host or os.environ.get("OLLAMA_HOST") or "")
        self.timeout = timeout

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.prefix}"

    def version(self) -> str:
        """Raises MissingError where no server answers."""
        return str(self.call("GET", "/api/version", timeout=CONNECT_SECONDS).get("version", ""))

    def upload(self, file: Path, digest: str) -> None:
        """Give the server a file, unless it has it. `digest` is `sha256:` and the file's digest."""
        try:
            self.call("HEAD", f"/api/blobs/{digest}")
            return
        except Refused as refused:
            if refused.status != 404:
                raise
        with file.open("rb") as stream:
            self.call("POST", f"/api/blobs/{digest}", stream, {"Content-Length": str(file.stat().st_size)})

    def delete(self, model: str) -> None:
        """Take a model out of the server's memory and off its disk."""
        self.call("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False}, timeout=DELETE_SECONDS)
        self.call("DELETE", "/api/delete", {"model": model}, timeout=DELETE_SECONDS)

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The JSON object that the server answers. `body` is an object for JSON, or an open file.

        Raises MissingError where there is no server, Refused where it says no, StageError where it does not finish.
        """
        if isinstance(body, Mapping):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        connection = self._connect()
        try:
            connection.sock.settimeout(self.timeout if timeout is None else timeout)
            connection.request(method, self.prefix + path, body, dict(headers or {}))
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise StageError(f"Ollama at {self.address} broke off at {method} {path}: {_why(error)}") from None
        finally:
            connection.close()
        return self._read(method, path, status, text)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise MissingError(f"no Ollama server answers at {self.address} ({_why(error)}). {HINT}") from None
        return connection

    def _read(self, method: str, path: str, status: int, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text) if text else {}
        except ValueError:
            value = {"error": text[:200].decode("utf-8", "replace")} if status >= 400 else None
        if not isinstance(value, dict):
            raise StageError(f"what answers at {self.address} is no Ollama server: {method} {path} gave {text[:80]!r}")
        if status >= 400 or "error" in value:
            reason = str(value.get("error") or f"HTTP {status}")
            raise Refused(f"Ollama refuses {method} {path.partition(':')[0]}: {reason}", status, reason)
        return value


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _address(text: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of an address, by the rules of Ollama's own `envconfig.Host`."""
    text = text.strip().strip("\"'")
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "http", text
    if scheme not in ("http", "https"):
        raise UsageError(f"OLLAMA_HOST is '{text}', which is neither http nor https. Write it as 127.0.0.1:{PORT}")
    bare = rest.partition("/")[0]
    if bare.count(":") > 1 and not bare.startswith("["):  # an IPv6 address of its own
        rest = f"[{bare}]{rest[len(bare) :]}"
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError as error:
        raise UsageError(f"OLLAMA_HOST is '{text}': {error}. Write it as 127.0.0.1:{PORT}") from None
    if host in ("0.0.0.0", "::"):  # what a server listens on; a client needs one of its addresses
        host = "127.0.0.1"
    default = PORT if not mark else 443 if scheme == "https" else 80
    return scheme, host, default if port is None else port, parts.path.rstrip("/")
