"""Who may ask: the names and pages that a server answers to, and its keys; looked at before anything of a request is read.

A server on a loopback address is open to every program of this machine, and a browser is one. A web page can send it
requests (their `Origin` tells), and can give its own name this machine's address (DNS rebinding; the `Host` tells).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from finetune.core.console import say
from finetune.core.errors import MissingError, UsageError
from finetune.serving.requests import Refused

if TYPE_CHECKING:
    from finetune.serving.app import App, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = "/health"  # needs no key: a load balancer has none
METHODS = ("GET", "POST")
DEFAULT_PORTS = {"http": 80, "https": 443}
KEY = re.compile(r"[\x21-\x7e]+")  # what a header can carry, without spaces


@dataclass(frozen=True, kw_only=True)
class Access:
    """`host` is what the server was bound to; `hosts` (name, port or None for any) and `origins` are allowed besides its
    own; without `keys` none is asked for."""

    host: str = "127.0.0.1"
    hosts: Sequence[tuple[str, int | None]] = ()
    origins: Sequence[str] = ()
    keys: Sequence[str] = ()


def access(
    host: str, hosts: Sequence[str], origins: Sequence[str], *, key_env: str | None = None, key_file: Path | None = None
) -> Access:
    """What the options of `finetune serve` say. Raises UsageError, and MissingError where there is no key to be read."""
    names = []
    for name in hosts:
        if (found := _authority(name)) is None:
            raise UsageError(f"--allowed-host {name} is no host: give a name or an address, with or without :PORT")
        names.append(found)
    allowed = [origin.rstrip("/").lower() for origin in origins]
    for origin in allowed:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*?#@]+", origin):
            raise UsageError(f"--allowed-origin {origin} is no origin: give SCHEME://HOST or SCHEME://HOST:PORT")
    keys = [*_keys_of_variable(key_env), *_keys_of_file(key_file)]
    return Access(host=host, hosts=names, origins=allowed, keys=keys)


def check_reach(address: str, asked: Access) -> None:
    """Raise UsageError for a server that other machines would reach without a key."""
    if not asked.keys and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UsageError(
            f"--host {asked.host} would open the model to everyone who reaches this machine. Give it a key, with "
            "--api-key-env NAME or --api-key-file FILE; or listen on 127.0.0.1, and reach it through a tunnel"
        )


def application(app: App, asked: Access) -> App:
    """An ASGI application that lets through to `app` only who may ask."""
    keys = [_digest(key) for key in asked.keys]
    headers_of_all = {"allow_methods": METHODS, "allow_headers": ["*"], "allow_private_network": True}
    cors: App = CORSMiddleware(app, allow_origins=asked.origins, **headers_of_all) if asked.origins else app

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        preflight = scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
        passed: App = cors
        try:
            _check_host(headers, scope["server"], asked)
            _check_origin(headers, scope["server"], asked)
            if not preflight:
                _check_key(headers, scope["path"], keys)
                _check_type(headers, scope["method"])
        except Refused as refused:
            more = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
            passed = JSONResponse(refused.error, refused.status, more)
            if refused.status != 403 and asked.origins:  # a page that may ask may also read why it was refused
                passed = CORSMiddleware(passed, allow_origins=asked.origins)
        await passed(scope, receive, send)

    return guarded


def _check_host(headers: Headers, server: tuple[str, int], asked: Access) -> None:
    """The name that the client believes to talk to: this machine's own, or one that was allowed."""
    given = headers.getlist("host")
    found = _authority(given[0]) if len(given) == 1 else None
    if found is not None:
        name, port = found
        own = name in _own_names(server, asked) and port in (None, server[1])
        if own or found in asked.hosts or (name, None) in asked.hosts:
            return
    shown = ", ".join(given) or "none"
    raise Refused(
        f"this server does not answer to the host {_cut(shown)}; it has to be started with --allowed-host for that",
        status=403, code="host_not_allowed",
    )  # fmt: skip


def _check_origin(headers: Headers, server: tuple[str, int], asked: Access) -> None:
    """The web page that a request comes from, if any: one of this address, or one that was allowed."""
    given = headers.getlist("origin")
    if not given:
        return
    origin = given[0].lower()
    if len(given) == 1 and origin in asked.origins:
        return
    scheme, _, rest = origin.partition("://")
    found = _authority(rest) if len(given) == 1 and scheme in DEFAULT_PORTS else None
    if found is not None:
        name, port = found[0], found[1] or DEFAULT_PORTS[scheme]
        if (rest == headers["host"].lower()) or (name in _own_names(server, asked) and port == server[1]):
            return
    raise Refused(
        f"this server does not answer to pages of {_cut(', '.join(given))}; it has to be started with --allowed-origin "
        "for that",
        status=403, code="origin_not_allowed",
    )  # fmt: skip


def _own_names(server: tuple[str, int], asked: Access) -> set[str]:
    """The loopback names, what the server was bound to, and the address at which this client reached it."""
    return {*LOOPBACK, asked.host.lower().strip("[]"), server[0].partition("%")[0].removeprefix("::ffff:")}


def _check_key(headers: Headers, path: str, keys: Sequence[bytes]) -> None:
    if not keys or path == OPEN:
        return
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = _digest(key.strip() if scheme.lower() == "bearer" else "")
    # All are compared, each in constant time: how long it takes says nothing of a key.
    same = [hmac.compare_digest(given, known) for known in keys]
    if not any(same):
        raise Refused(
            "this server asks for a key: send it as the header 'Authorization: Bearer KEY'",
            status=401, code="invalid_api_key",
        )  # fmt: skip


def _check_type(headers: Headers, method: str) -> None:
    """A browser asks before it sends JSON to another site's server, and does not before it sends a form or a text."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise Refused(
            f"a request's body has the type application/json here, not {_cut(kind or 'none')}: "
            "send the header 'Content-Type: application/json'",
            status=415, code="unsupported_media_type",
        )  # fmt: skip


def _authority(text: str) -> tuple[str, int | None] | None:
    """(name, port) of `NAME`, `NAME:PORT`, `[ADDRESS]` or `[ADDRESS]:PORT`; None for anything else."""
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.netloc != text or parts.username is not None or text.endswith(":"):
        return None
    return (parts.hostname, port) if re.fullmatch(r"[\w.:-]+", parts.hostname, re.ASCII) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _keys_of_variable(name: str | None) -> list[str]:
    """The variable's value, which is taken out of the environment: what this process starts has no use for it."""
    if name is None:
        return []
    value = os.environ.pop(name, "")
    if not value.strip():
        raise MissingError(f"--api-key-env {name}: there is no such variable in the environment, or it is empty")
    return [_valid(value.strip(), f"the variable {name}")]


def _keys_of_file(path: Path | None) -> list[str]:
    """One key a line: a new one is added before the old one goes."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        others = os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077
    except (OSError, ValueError) as error:
        raise MissingError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = [_valid(line.strip(), f"{path}") for line in lines if line.strip()]
    if not keys:
        raise MissingError(f"--api-key-file {path} holds no key: write one a line")
    if others:
        say(f"note: others on this machine may read {path}, which has keys in it; chmod 600 keeps them out")
    return keys


def _valid(key: str, where: str) -> str:
    if not KEY.fullmatch(key):
        raise UsageError(f"the key in {where} has spaces or letters that a header cannot carry: use printable ASCII")
    return key
