"""Ollama's API: the client, where it looks for a server, and the stand-in that tier 1 asks instead of one."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from finetune.backends.ollama import OllamaBackend, api, unavailable
from finetune.core.errors import MissingError, StageError, UsageError
from support.ollama import serve
from support.ollama_contract import OllamaAnswers
from support.small_gguf import write_gguf

KEYS = {"general.architecture": "llama", "general.name": "town", "llama.block_count": 2, "llama.context_length": 512}


class TestTheStandInAnswers(OllamaAnswers):
    """As a real server does (tests/tier3/test_ollama.py)."""

    @pytest.fixture(scope="class")
    @classmethod
    def gguf(cls, tmp_path_factory):
        return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", KEYS)

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, tmp_path_factory):
        with serve(tmp_path_factory.mktemp("server")) as running:
            yield api.Client(running.address)


def test_a_server_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = api.Client(f"127.0.0.1:{listening.getsockname()[1]}", timeout=0.2)
        begun = time.monotonic()
        with pytest.raises(StageError, match="timed out"):
            client.call("POST", "/api/show", {"model": "x"})
        assert time.monotonic() - begun < 30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_no_server_is_a_reason_with_the_way_to_get_one(tmp_path, monkeypatch):
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\n", encoding="ascii")
    (tmp_path / "model.gguf").touch()
    port = free_port()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    reason = unavailable()
    assert f"no Ollama server answers at http://127.0.0.1:{port}" in reason
    assert "https://ollama.com/download" in reason and "ollama serve" in reason
    with pytest.raises(MissingError) as caught:
        OllamaBackend().load(tmp_path)
    assert str(caught.value) == reason


def test_a_server_is_available(tmp_path, monkeypatch):
    with serve(tmp_path) as running:
        monkeypatch.setenv("OLLAMA_HOST", running.address)
        assert unavailable() is None


def test_what_is_no_ollama_server_is_not_taken_for_one(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{listening.getsockname()[1]}")

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "is no Ollama server" in unavailable()
        thread.join()


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("localhost", "http://localhost:11434"),
        (":8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("10.0.0.1:1234", "http://10.0.0.1:1234"),
        ("http://box", "http://box:80"),
        ("https://box/ollama/", "https://box:443/ollama"),
        ("::1", "http://::1:11434"),
        ("[::1]:99", "http://::1:99"),
        ('"127.0.0.1:5"', "http://127.0.0.1:5"),
    ],
)
def test_a_host_is_read_as_ollama_reads_it(monkeypatch, written, address):
    monkeypatch.setenv("OLLAMA_HOST", written)
    assert api.Client().address == address


@pytest.mark.parametrize(
    ("written", "words"), [("ftp://box", "neither http nor https"), ("box:port", "OLLAMA_HOST is")]
)
def test_a_host_that_makes_no_sense_is_refused(written, words):
    with pytest.raises(UsageError, match=words):
        api.Client(written)


def test_the_stand_in_refuses_what_ollama_does_not_know(tmp_path):
    def ask() -> None:
        with serve(tmp_path) as running, pytest.raises(StageError, match="'model' is missing"):
            api.Client(running.address).call("POST", "/api/show", {"modle": "x"})

    with pytest.raises(AssertionError, match="no field 'modle'"):
        ask()
