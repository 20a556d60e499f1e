"""The door of `finetune serve`, listening before a made-up engine: who gets in, and how long one may dawdle."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import MissingError, UsageError
from finetune.serving import app, connections
from finetune.serving.access import Access, access, check_reach
from support.door import ASKED, HELLO, Door, Fake, listening, read_all

CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(ASKED)), json.dumps(ASKED).encode())
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def closed() -> Iterator[Door]:
    """A door that allows nothing beyond what it does by itself."""
    with listening() as found:
        yield found


def outcome(found: Door, body: Any = ASKED, path: str = "/v1/chat/completions", **more: Any) -> int:
    """The status of a request; an error has OpenAI's shape."""
    status, answer, _ = found.request(body, path, **more)
    if status >= 400:
        assert answer["error"]["message"] and answer["error"]["type"] in ("invalid_request_error", "server_error")
    return status


# -- names and pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "localhost"]
)
def test_a_loopback_name_is_answered(closed: Door, host: str) -> None:
    assert outcome(closed, Host=host.format(port=closed.port)) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:{port}", "localhost.evil.test:{port}", "127.0.0.1:1", "127.0.0.1.evil.test", "127.0.0.2:{port}",
     "localhost:", "user@localhost:{port}", "", "0.0.0.0:{port}", "localhost, evil.test", "[::1", "2130706433"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/v1/models", "/nowhere"])
def test_another_name_is_refused_whatever_is_asked(closed: Door, host: str, path: str) -> None:
    body = ASKED if "chat" in path else None
    status, answer, _ = closed.request(body, path, Host=host.format(port=closed.port))
    assert (status, "--allowed-host" in answer["error"]["message"]) == (403, True)


def test_a_request_with_no_name_or_two_is_refused(closed: Door) -> None:
    for head in (
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    ):
        with closed.raw(head) as connection:
            assert read_all(connection).split(b" ", 2)[1] in (b"400", b"403")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.test", "https://127.0.0.1:{port}.evil.test", "null", "http://localhost", "http://localhost:3000", "",
     "file://", "chrome-extension://abc", "http://evil.test:{port}"],
)  # fmt: skip
def test_a_web_page_of_another_origin_is_refused(closed: Door, origin: str) -> None:
    """A page on another port of this machine is another page."""
    asked = origin.format(port=closed.port)
    for method, body in (("POST", ASKED), ("GET", None)):
        path = "/v1/chat/completions" if body else "/v1/models"
        status, answer, headers = closed.request(body, path, method=method, Origin=asked)
        assert (status, "--allowed-origin" in answer["error"]["message"]) == (403, True)
        assert "access-control-allow-origin" not in headers
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, _, headers = closed.request(None, method="OPTIONS", Origin=asked, **asking)
    assert (status, "access-control-allow-origin" in headers) == (403, False)


def test_a_page_of_the_same_origin_is_answered(closed: Door) -> None:
    for name in ("127.0.0.1", "localhost", "[::1]"):
        assert outcome(closed, Origin=f"http://{name}:{closed.port}") == 200


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", ""],
)
def test_a_body_that_a_browser_sends_unasked_is_refused(closed: Door, kind: str | None) -> None:
    assert outcome(closed, Content_Type=kind) == 415
    assert outcome(closed, Content_Type="Application/JSON; charset=utf-8") == 200


def test_what_is_allowed_is_answered_and_nothing_else() -> None:
    asked = access(
        "127.0.0.1",
        ["llm.test", "tunnel.test:9000", "[2001:db8::1]:80"],
        ["https://app.test/", "http://localhost:3000"],
    )
    with listening(asked) as found:
        for host, status in {
            "llm.test": 200, "LLM.test:1234": 200, "tunnel.test:9000": 200, "tunnel.test": 403, "tunnel.test:90": 403,
            "[2001:db8::1]:80": 200, "[2001:db8::2]:80": 403, "other.llm.test": 403, "localhost": 200,
        }.items():  # fmt: skip
            assert outcome(found, Host=host) == status, host
        for origin in ("https://app.test", "http://localhost:3000"):
            status, _, headers = found.request(ASKED, Origin=origin)
            assert (status, headers["access-control-allow-origin"]) == (200, origin)
            status, _, headers = found.request({**ASKED, "n": "x"}, Origin=origin)  # an error may be read too
            assert (status, headers["access-control-allow-origin"]) == (400, origin)
            asking = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            status, _, headers = found.request(None, method="OPTIONS", Origin=origin, **asking)
            assert (status, headers["access-control-allow-origin"]) == (200, origin)
            assert "authorization" in headers["access-control-allow-headers"]
            assert "POST" in headers["access-control-allow-methods"]
        for origin in (
            "http://app.test",
            "https://app.test:8443",
            "http://localhost:3001",
            "https://app.test.evil.test",
        ):
            assert outcome(found, Origin=origin) == 403, origin


@pytest.mark.parametrize(
    ("hosts", "origins", "words"),
    [
        (["http://llm.test"], [], "--allowed-host http://llm.test is no host"),
        (["a b"], [], "is no host"),
        (["*"], [], "is no host"),
        ([""], [], "is no host"),
        ([], ["app.test"], "--allowed-origin app.test is no origin"),
        ([], ["*"], "is no origin"),
        ([], ["null"], "is no origin"),
        ([], ["https://app.test/page"], "is no origin"),
    ],
)
def test_a_name_that_can_never_be_met_is_told(hosts: list[str], origins: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        access("127.0.0.1", hosts, origins)
    assert words in str(caught.value)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_only_a_key_opens_and_health_stays_open() -> None:
    with listening(Access(keys=["first-key", "second-key"], origins=["https://app.test"])) as found:
        assert outcome(found, None, "/health") == 200
        for path, body in (
            ("/v1/models", None),
            ("/v1/chat/completions", ASKED),
            ("/nowhere", None),
            ("/health/", None),
        ):
            status, answer, headers = found.request(body, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), path
            assert headers["www-authenticate"] == "Bearer"
        for right in ("Bearer first-key", "bearer second-key", "Bearer  first-key "):
            assert outcome(found, Authorization=right) == 200
        for wrong in (
            "first-key",
            "Bearer",
            "Bearer first-ke",
            "Bearer first-key2",
            "Basic first-key",
            "Bearer \xff",
            "",
        ):
            assert outcome(found, Authorization=wrong) == 401, wrong
        assert outcome(found, Host="evil.test", Authorization="Bearer first-key") == 403
        status, _, headers = found.request(ASKED, Origin="https://app.test")
        assert (status, headers["access-control-allow-origin"]) == (401, "https://app.test")
        status, _, _ = found.request(
            None, method="OPTIONS", Origin="https://app.test", Access_Control_Request_Method="POST"
        )
        assert status == 200  # a browser asks this without the key
    assert len(found.fake.seen) == 3


def test_a_key_comes_from_a_variable_that_no_child_inherits_or_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    monkeypatch.setenv("TOWN_KEY", " of-a-variable ")
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    file.chmod(0o600)
    assert access("::1", [], [], key_env="TOWN_KEY", key_file=file).keys == ["of-a-variable", "one", "two"]
    assert "TOWN_KEY" not in os.environ
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    access("::1", [], [], key_file=file)
    assert "others on this machine may read" in capsys.readouterr().err
    for words, more in {
        "there is no such variable": {"key_env": "TOWN_KEY"},
        "cannot be read": {"key_file": tmp_path / "none"},
    }.items():
        with pytest.raises(MissingError, match=words):
            access("::1", [], [], **more)  # type: ignore[arg-type]
    for text, error in (("", MissingError), ("a key", UsageError), ("schlüssel", UsageError)):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(error):
            access("::1", [], [], key_file=file)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "fe80::1%eth0"])
def test_an_address_that_others_reach_needs_a_key(address: str) -> None:
    with pytest.raises(UsageError, match="would open the model to everyone"):
        check_reach(address, Access(host=address))
    check_reach(address, Access(host=address, keys=["k"]))
    for own in ("127.0.0.1", "127.8.8.8", "::1"):
        check_reach(own, Access(host=own))


# -- clients that dawdle -----------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is a fraction of a second."""
    for name, seconds in (("HEAD", 0.6), ("STALL", 0.8), ("LINGER", 0.2), ("LOOK", 0.05), ("IDLE", 0.4)):
        monkeypatch.setattr(connections, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.6)


def gone(found: Door, seconds: float = 8) -> bool:
    """Whether the server has no connection left, within some time."""
    end = time.monotonic() + seconds
    while found.connections() and time.monotonic() < end:
        time.sleep(0.05)
    return found.connections() == 0


HALVES = {
    "a body that lacks a byte": (HEAD + b'Content-Length: 20\r\n\r\n{"prompt": "Hello"}'[:-2], b"408"),
    "a body that never begins": (HEAD + b"Content-Length: 20\r\n\r\n", b"408"),
    "a chunk that lacks its end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
    "chunks without the last": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b"408"),
    "half a head": (HEAD, b"408"),
    "half a line": (b"POST /v1/cha", b"408"),
    "nothing": (b"", b"408"),
    "a line break": (b"\r\n", b"400"),
}


@pytest.mark.parametrize(("sent", "status"), HALVES.values(), ids=HALVES)
def test_what_is_sent_by_half_holds_nothing_for_good(hurried: None, sent: bytes, status: bytes) -> None:
    with listening() as found, found.raw(sent) as connection:
        answer = read_all(connection)
        assert answer.split(b" ", 2)[1] == status
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert gone(found) and found.is_honest()


def test_200_half_sent_bodies_keep_nobody_out_and_end(hurried: None) -> None:
    with listening() as found:
        sent = HEAD + b'Content-Length: 500\r\n\r\n{"messages": ['
        waiting = [found.raw(sent) for _ in range(200)]
        assert found.is_honest()
        assert all(read_all(each).startswith(b"HTTP/1.1 408") for each in waiting)
        assert gone(found) and found.is_honest()


def test_a_head_that_comes_byte_by_byte_has_its_time_and_no_more(hurried: None) -> None:
    with listening() as found, found.raw() as connection:
        begin = time.monotonic()
        with suppress(ConnectionError):
            for byte in HEAD * 100:
                connection.send(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begin < 60
        assert gone(found) and found.is_honest()


def test_a_connection_that_is_kept_has_its_time_and_no_more(hurried: None) -> None:
    """Also where its next request is only begun."""
    for rest in (b"", b"GET /hea"):
        with listening() as found, found.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            connection.sendall(rest)
            read_all(connection)
            assert gone(found) and found.is_honest()


def test_a_client_that_reads_nothing_of_its_answer_is_let_go(hurried: None) -> None:
    async def much(scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"a" * 2**20, "more_body": True})
            await asyncio.sleep(0)  # as an engine does that computes what it sends

    with listening(fake=Fake(answer=much)) as found:
        connection = found.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert found.fake.left.wait(15)
        assert gone(found)
        connection.close()


def test_a_client_that_leaves_in_the_midst_of_a_stream_frees_its_place() -> None:
    async def endless(scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            await asyncio.sleep(0.05)

    with listening(fake=Fake(answer=endless)) as found:
        with found.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            assert connection.recv(100)
        assert found.fake.left.wait(5)
        assert gone(found)


def test_too_many_connections_are_told_so_and_leave_room_again(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 20)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 30)
    with listening() as found:
        waiting = [found.raw() for _ in range(20)]
        for _ in range(3):
            status, answer, _ = found.request(ASKED)
            assert (status, "too many connections" in answer["error"]["message"]) == (503, True)
        for each in waiting:
            each.close()
        assert gone(found) and found.is_honest()


def test_no_more_connections_than_the_process_may_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for soft, most in ((256, 96), (1024, 480), (10**6, connections.CONNECTIONS), (-1, connections.CONNECTIONS)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections.most_connections() == most


# -- what is no request ------------------------------------------------------------------------------------------------

BROKEN = {
    "no HTTP": b"hello\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
    "a length that is no number": HEAD + b"Content-Length: many\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a length and chunks": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "a chunk's length that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "an encoding that is none": HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "a header of 100 kB": HEAD + b"X: " + b"a" * 100_000,
    "10,000 headers": HEAD + b"X: y\r\n" * 10_000,
    "a header with a zero": HEAD + b"X: \0\r\n\r\n",
    "a length that says less": HEAD + b"Content-Length: 2\r\n\r\n{}garbage\r\n\r\n",
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_no_request_gets_an_answer_and_holds_nothing(hurried: None, sent: bytes) -> None:
    with listening() as found:
        with found.raw(sent) as connection:
            answer = read_all(connection)
        assert answer.split(b" ", 2)[1][:1] == b"4", answer[:200]
        assert b'"error"' in answer
        assert gone(found) and found.is_honest()


@pytest.mark.parametrize("head", [b"Content-Length: 8388609\r\n\r\n", b"Content-Length: 9999999999999999999\r\n\r\n"])
def test_a_body_that_says_it_is_too_long_is_not_waited_for(closed: Door, head: bytes) -> None:
    with closed.raw(HEAD + head) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert closed.is_honest()


def test_chunks_without_an_end_are_read_up_to_the_limit(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LONGEST", 2**20)
    with listening() as found, found.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        assert gone(found) and found.is_honest()


def test_bodies_that_are_read_at_a_time_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "HELD", 300_000)
    with listening() as found:
        sent = HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 190_000
        waiting: list[socket.socket] = []
        for _ in range(2):
            waiting.append(found.raw(sent))
            time.sleep(1)
        assert waiting[1].recv(1000).startswith(b"HTTP/1.1 503")
        for each in waiting:
            each.close()
        assert gone(found) and found.is_honest()


def test_an_honest_body_in_chunks_is_answered(closed: Door) -> None:
    body = json.dumps({"messages": HELLO}).encode()
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n"
    with closed.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
