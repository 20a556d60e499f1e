"""What becomes of the door when the server behind it dies: with a made-up one in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from finetune.core import processes
from finetune.core.errors import StageError
from finetune.serving import Server, app, bind, connections, keeper, proxy, serve
from finetune.serving.access import Access
from support.door import ASKED, JSON, Door, listening

# It answers after `pause` seconds, sends a stream in ten parts, and says which process it is.
PLAYED = """
import json, os, socketserver, sys, threading, time
from finetune.core import processes as child
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if os.path.exists(sys.argv[2] + ".hang"): time.sleep(60)
        self.answer(json.dumps({"status": "ok", "pid": os.getpid()}).encode())
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("stream"):
            self.answer(b"", "text/event-stream")
            for _ in range(100):
                self.wfile.write(b'data: {}\\n\\n')
                time.sleep(float(asked["user"]))
            self.wfile.write(b'data: [DONE]\\n\\n')
            return
        if "user" in asked:
            time.sleep(float(asked["user"]))
        self.answer(json.dumps({"choices": [{"message": {"role": "assistant", "content": "HELLO"}}]}).encode())

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

if os.path.exists(sys.argv[2]):
    sys.exit("cannot load it again")
server = Server(sys.argv[1], Handler)
child.tell("unix://" + sys.argv[1])
threading.Thread(target=server.serve_forever, daemon=True).start()
print("about to wait", file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How to start the made-up server; what makes it fail to start when it is there; and the folders it was given."""
    (tmp_path / "played.py").write_text(PLAYED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fails, folders = tmp_path / "fails", []

    def start(path: Path, called_off: Any) -> AbstractContextManager[processes.Running]:
        folders.append(path.parent)
        return processes.running("played", [str(path), str(fails)], what="it", called_off=called_off)

    return SimpleNamespace(start=start, fails=fails, folders=folders)


@pytest.fixture
def kept(played: SimpleNamespace) -> Iterator[tuple[Door, keeper.Keeper, list[str], SimpleNamespace]]:
    ends: list[str] = []
    with (
        keeper.kept(played.start, "the model's server", ends.append) as found,
        listening(app=proxy.application(found)) as opened,
    ):
        yield opened, found, ends, played
    assert not any(folder.exists() for folder in played.folders)


def pid(opened: Door) -> int:
    return int(opened.request(None, "/health")[1]["pid"])


def until(wanted: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_socket_lies_where_nobody_else_may_look(kept: Any) -> None:
    opened, found, _, _ = kept
    assert stat.S_IMODE(found.socket.parent.stat().st_mode) == 0o700
    listening = [each for each in psutil.Process(pid(opened)).net_connections("inet") if each.status == "LISTEN"]
    assert listening == []


def test_a_socket_has_a_short_path_wherever_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with keeper.private_folder() as folder, socket.socket(socket.AF_UNIX) as held:
        held.bind(str(folder / "s.sock"))
    assert not folder.exists()


def test_what_is_asked_while_it_dies_gets_an_error_and_what_is_asked_later_an_answer(kept: Any) -> None:
    opened, _, ends, _ = kept
    assert opened.is_honest()
    first = pid(opened)
    with ThreadPoolExecutor(2) as others:
        waiting = others.submit(opened.request, {**ASKED, "user": "30"})
        streamed = others.submit(opened.request, {**ASKED, "stream": True, "user": "0.1"})
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        status, answer, _ = waiting.result(20)
        assert (status, answer["error"]["type"]) == (502, "server_error")
        assert "the model's own server does not answer" in answer["error"]["message"]
        status, text, _ = streamed.result(20)
        *_, last = text.strip().split(b"\n\n")
        assert status == 200 and json.loads(last.removeprefix(b"data: "))["error"]["message"]
    until(lambda: opened.request(None, "/health")[0] == 200)
    assert pid(opened) != first and opened.is_honest() and ends == []
    status, text, _ = opened.request({**ASKED, "stream": True, "user": "0"})
    assert (status, text) == (200, b"data: {}\n\n" * 100 + b"data: [DONE]\n\n")


def test_while_there_is_none_health_says_so(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, found, _, _ = kept
    go_on = threading.Event()
    start = found.start

    @contextmanager
    def slow(path: Path, called_off: Any) -> Iterator[processes.Running]:
        go_on.wait(20)
        with start(path, called_off) as running:
            yield running

    found.start = slow
    os.kill(pid(opened), signal.SIGKILL)
    until(lambda: found.socket is None)
    for path, body in (("/health", None), ("/v1/chat/completions", ASKED)):
        status, answer, _ = opened.request(body, path)
        assert (status, "was ended by SIGKILL" in answer["error"]["message"]) == (503, True)
        assert "about to wait" in answer["error"]["message"]
    go_on.set()
    until(lambda: opened.request(None, "/health")[0] == 200)
    assert opened.is_honest()


def test_health_does_not_wait_for_a_server_that_hangs(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, _, _, played = kept
    monkeypatch.setattr(proxy, "HEALTH_SECONDS", 0.3)
    hang = played.fails.with_name("fails.hang")
    hang.touch()
    assert opened.request(None, "/health")[0] == 503
    hang.unlink()
    assert opened.request(None, "/health")[0] == 200


def test_it_is_started_again_so_often_and_then_given_up(kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    opened, found, ends, _ = kept
    for number in range(1, keeper.RESTARTS + 1):
        os.kill(pid(opened), signal.SIGKILL)
        until(lambda: opened.request(None, "/health")[0] == 200)
        said = capsys.readouterr().err
        assert "was ended by SIGKILL" in said and f"({number} of {keeper.RESTARTS} times)" in said
    os.kill(pid(opened), signal.SIGKILL)
    until(lambda: ends)
    assert "started again 3 times within 600 s" in ends[0]
    assert opened.request(None, "/health")[0] == 503


def test_ends_long_ago_are_forgiven(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, _, ends, _ = kept
    monkeypatch.setattr(keeper, "WITHIN_SECONDS", 0.0)
    for _ in range(keeper.RESTARTS + 1):
        os.kill(pid(opened), signal.SIGKILL)
        until(lambda: opened.request(None, "/health")[0] == 200)
    assert ends == []


def test_one_that_cannot_be_started_again_is_given_up_at_once(kept: Any) -> None:
    opened, _, ends, played = kept
    played.fails.touch()
    os.kill(pid(opened), signal.SIGKILL)
    until(lambda: ends)
    assert "it does not start: it ended with exit code 1" in ends[0] and "cannot load it again" in ends[0]


def test_leaving_while_it_is_started_again_leaves_nothing(played: SimpleNamespace) -> None:
    with keeper.kept(played.start, "it", lambda why: None) as found:
        first = found.running.process
        found.start = lambda path, called_off: processes.running(
            "http.server", ["0"], what="one that never says its address", called_off=called_off
        )
        first.kill()
        until(lambda: found.ends)
        begin = time.monotonic()
    assert time.monotonic() - begin < 10
    assert [
        each for each in psutil.Process().children(recursive=True) if each.is_running() and each.pid != first.pid
    ] == []


def test_one_that_does_not_start_at_first_is_an_error(played: SimpleNamespace) -> None:
    played.fails.touch()
    with pytest.raises(StageError, match="cannot load it again"), keeper.kept(played.start, "it", print):
        raise AssertionError("it started")
    assert not any(folder.exists() for folder in played.folders)


STARTED: dict[str, Any] = {}


@contextmanager
def engine(model: Any, run: Any, recipe: Any, ended: Any) -> Iterator[Any]:
    with keeper.kept(STARTED["start"], "the model's server", ended) as found:
        yield proxy.application(found)


def test_the_whole_server_ends_with_an_error_once_it_is_given_up(
    played: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    STARTED["start"] = played.start
    row = Server(start=f"{__name__}:engine", extra="gguf", packages=())
    monkeypatch.setitem(serve.__globals__["SERVERS"], "llamacpp", row)
    recipe: Any = SimpleNamespace(name="town", template=SimpleNamespace(system=None))
    port: list[int] = []

    def die() -> None:
        address = http.client.HTTPConnection("127.0.0.1", port[0], timeout=20)
        address.request("GET", "/health", headers=JSON)
        found = json.loads(address.getresponse().read())["pid"]
        played.fails.touch()
        os.kill(found, signal.SIGKILL)

    with bind("127.0.0.1", 0) as held:
        port.append(held.getsockname()[1])
        ready = threading.Thread(target=die)
        with pytest.raises(
            StageError, match=r"(?s)the model's own cannot be kept:\nit does not start.*cannot load it again"
        ):
            serve("llamacpp", Path(), recipe, recipe, held, Access(), ready.start)
        ready.join()


def test_bounds_are_those_that_the_docs_name() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    for bound in (
        f"{connections.HEAD_SECONDS:.0f} s for a head", f"{app.BODY_SECONDS:.0f} s for a body",
        f"{connections.IDLE_SECONDS} s between two", f"{connections.STALL_SECONDS:.0f} s in which",
        f"{connections.CONNECTIONS} connections", f"{app.LONGEST // 2**20} MiB", f"{keeper.RESTARTS} times",
    ):  # fmt: skip
        assert bound in text, bound
