"""A stand-in for the Hugging Face hub on the loopback interface, for what this package asks of it.

Paths, headers, status codes and error codes are those that huggingface_hub 2.4 reads. Weights are redirected to another
host name (`localhost` for `127.0.0.1`), as the real hub redirects them to its storage, which must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_HEADER = b'{"w": {"dtype": "U8", "shape": [5000], "data_offsets": [0, 5000]}}'
# A whole file of safetensors: the header's length, the header, 5,000 bytes.
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + b"s" * 5000

LARGE = (".safetensors", ".bin", ".gguf", ".parquet")
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)")
_VERBS = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)/(?P<verb>revision|tree)/(?P<revision>[^/]+)(?P<under>/.*)?"
)
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `status` is what was answered."""

    method: str
    host: str
    path: str
    authorization: str | None
    range: str | None
    status: int


@dataclass
class Hub:
    """The running stand-in. `repos` maps `owner/name` (or `datasets/owner/name`) to a directory."""

    repos: dict[str, Path]
    url: str = ""
    token: str | None = None  # the one valid token; any other is refused
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    busy: int = 0  # how many of the next requests are answered with `status` and `retry_after`
    status: int = 429
    retry_after: str = "0"
    busy_at: str = "/"  # in the paths that are meant
    cut: set[str] = field(default_factory=set)  # files whose next download breaks off half way
    reset: set[str] = field(default_factory=set)  # and those where the connection is reset there
    requests: list[Request] = field(default_factory=list)
    connections: set[socket.socket] = field(default_factory=set, repr=False)

    def __str__(self) -> str:
        return self.url

    def commit(self, repo: str) -> str:
        """The commit of a repository: a digest of its file names and contents."""
        total = hashlib.sha1(usedforsecurity=False)
        for name, file in sorted(self.files(repo).items()):
            total.update(name.encode() + b"\0" + file.read_bytes())
        return total.hexdigest()

    def files(self, repo: str) -> dict[str, Path]:
        root = self.repos[repo]
        return {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}


@contextmanager
def serve(repos: dict[str, Path], **options: Any) -> Iterator[Hub]:
    """Serve the repositories until the block ends; set HF_ENDPOINT to `hub.url`."""
    hub = Hub(dict(repos), **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for connection in list(hub.connections):  # kept alive by clients, and answering still
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.busy > 0 and self.hub.busy_at in path:
            self.hub.busy -= 1
            self._send(self.hub.status, {"Retry-After": self.hub.retry_after}, b"")
        elif path.startswith("/storage/"):
            self._stored(path)
        elif match := _FILE.fullmatch(path):
            self._resolve(match["kind"] or "", match["repo"], match["revision"], match["name"])
        elif match := _VERBS.fullmatch(path):
            self._api(_key(match), match["verb"], match["revision"])
        elif match := _API.fullmatch(path):
            self._api(_key(match), "revision", "main")
        else:
            self._error(404, "", "Not Found")

    # -- answers --------------------------------------------------------------------------------------------------

    def _api(self, repo: str, verb: str, revision: str) -> None:
        if not self._allowed(repo, revision):
            return
        listing = [self._entry(name, file) for name, file in self.hub.files(repo).items()]
        if verb == "tree":
            self._send_json(listing)
            return
        name = repo.removeprefix("datasets/")
        siblings = [
            {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
            | (
                {"lfs": {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}}
                if "lfs" in entry
                else {}
            )
            for entry in listing
        ]
        self._send_json(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": self.hub.commit(repo),
                "private": repo in self.hub.private,
                "gated": "manual" if repo in self.hub.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _resolve(self, kind: str, repo: str, revision: str, name: str) -> None:
        key = kind + repo
        if not self._allowed(key, revision):
            return
        commit = {"X-Repo-Commit": self.hub.commit(key)}
        file = self.hub.files(key).get(name)
        if file is None:
            self._error(404, "EntryNotFound", "Entry not found", commit)
        elif name.endswith(LARGE):
            entry = self._entry(name, file)
            host = f"http://localhost:{self.server.server_address[1]}"
            linked = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
            self._send(302, {**commit, **linked, "Location": f"{host}/storage/{key}/-/{name}"}, b"")
        else:
            self._send_file(file, {**commit, "ETag": f'"{self._entry(name, file)["oid"]}"'})

    def _stored(self, path: str) -> None:
        key, _, name = path.removeprefix("/storage/").partition("/-/")
        file = self.hub.files(key)[name]
        self._send_file(file, {"ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'})

    def _allowed(self, repo: str, revision: str) -> bool:
        """Answer with the error that the hub has for it, if there is one."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given != self.hub.token:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo not in self.hub.repos or (repo in self.hub.private and not given):
            # The hub does not tell strangers what is not there from what is not theirs.
            self._error(404 if given else 401, "RepoNotFound", "Repository not found")
        elif repo in self.hub.gated:
            self._error(403 if given else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif revision not in ("main", self.hub.commit(repo)):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _entry(self, name: str, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": name}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    # -- writing --------------------------------------------------------------------------------------------------

    def _send_file(self, file: Path, headers: dict[str, str]) -> None:
        content, status = file.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if start >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
        self._send(
            status, {"Accept-Ranges": "bytes", **headers}, content, cut=file.name in self.hub.cut | self.hub.reset
        )
        if self.command == "GET":
            self.hub.cut.discard(file.name)
            if file.name in self.hub.reset:
                self.hub.reset.discard(file.name)
                time.sleep(0.2)  # a reset takes what the client has not read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        said = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self._send(status, {**(headers or {}), **said, "Content-Type": "application/json"}, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.hub.requests.append(
            Request(
                self.command,
                self.headers.get("Host") or "",
                self.path,
                self.headers.get("Authorization"),
                self.headers.get("Range"),
                status,
            )
        )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def _key(match: re.Match[str]) -> str:
    return ("datasets/" if match["kind"] == "datasets" else "") + match["repo"]
