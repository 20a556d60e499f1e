"""A stand-in for an Ollama server on the loopback interface, for what this package asks of it.

Fields and the order of template, SYSTEM and messages are those of Ollama 0.32 (api/types.go, server/routes.go), answers
those of a real 0.24.0, with which it shares the tests of support/ollama_contract.py. Stricter than Ollama: what it lets
pass in silence (a field or an option that is not in its API, one of another type, an unknown role) is answered with 400
and kept in `faults`. It tells no log-probabilities, quantizes nothing, and has neither /api/ps nor OpenAI's endpoints.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from finetune.export import gotext
from finetune.models import gguf_header
from support import small_gguf

TEXT, NUMBER, FLAG, OBJECT, LIST = str, (int, float), bool, dict, list
# path: {field: type}, those of the API's reference; `!` marks one that must be there.
FIELDS: dict[str, dict[str, Any]] = {
    "/api/create": {
        "model!": TEXT, "files": OBJECT, "from": TEXT, "adapters": OBJECT, "template": TEXT, "license": (str, list),
        "system": TEXT, "parameters": OBJECT, "messages": LIST, "stream": FLAG, "renderer": TEXT, "parser": TEXT,
    },
    "/api/show": {"model!": TEXT, "verbose": FLAG},
    "/api/delete": {"model!": TEXT},
    "/api/generate": {
        "model!": TEXT, "prompt": TEXT, "suffix": TEXT, "images": LIST, "think": (bool, str), "format": (str, dict),
        "options": OBJECT, "system": TEXT, "template": TEXT, "stream": FLAG, "raw": FLAG, "keep_alive": (int, str),
        "context": LIST, "truncate": FLAG, "shift": FLAG, "logprobs": FLAG, "top_logprobs": NUMBER,
        "_debug_render_only": FLAG,
    },
    "/api/chat": {
        "model!": TEXT, "messages!": LIST, "tools": LIST, "think": (bool, str), "format": (str, dict),
        "options": OBJECT, "stream": FLAG, "keep_alive": (int, str), "truncate": FLAG, "shift": FLAG,
        "logprobs": FLAG, "top_logprobs": NUMBER, "_debug_render_only": FLAG,
    },
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "num_keep": int, "seed": int, "num_predict": int, "top_k": int, "top_p": float, "min_p": float, "typical_p": float,
    "repeat_last_n": int, "temperature": float, "repeat_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "stop": list, "num_ctx": int, "num_batch": int, "num_gpu": int, "main_gpu": int,
    "use_mmap": bool, "num_thread": int,
}  # fmt: skip
CONTEXT = 4096  # tokens, where nobody says how many


class Denied(Exception):
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error


def chatter(prompt: str) -> list[str]:
    """Pieces of an answer that depends on the prompt, ended by an end-of-turn token, as a model would give it."""
    mark = hashlib.sha256(prompt.encode()).hexdigest()
    return [*(f" {part}" for part in (mark[:3], mark[3:6], mark[6:9])), "<|im_end|>", " never seen"]


@dataclass
class Ollama:
    """The running stand-in. `models` maps names to what made them; `answer` gives the pieces that follow a prompt."""

    folder: Path
    version: str = "0.32.5"
    answer: Callable[[str], Sequence[str]] = chatter
    address: str = ""
    vocabulary: int = 300
    tensors: tuple[str, ...] = ("token_embd.weight",)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    cut: str = ""  # a path whose answers break off

    def asked(self, path: str) -> list[Any]:
        return [body for _, asked, body in self.requests if asked == path]

    def blob(self, digest: str) -> Path:
        return self.folder / digest.replace(":", "-")

    # -- what it answers ------------------------------------------------------------------------------------------

    def check(self, path: str, body: Any) -> None:
        """Fields and their types, as strictly as they are documented."""
        known = FIELDS[path]
        wrong = [f"no field '{name}'" for name in body if name not in known and f"{name}!" not in known]
        for name, kind in known.items():
            value = body.get(name.rstrip("!"))
            if value is None and name.endswith("!"):
                wrong.append(f"'{name[:-1]}' is missing")
            elif value is not None and not isinstance(value, kind):
                wrong.append(f"'{name.rstrip('!')}' is a {type(value).__name__}")
        for name, value in {**(body.get("options") or {}), **(body.get("parameters") or {})}.items():
            kind = OPTIONS.get(name)
            if kind is None or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                wrong.append(f"option '{name}' is {value!r}")
        for message in body.get("messages") or []:
            if set(message) != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
                wrong.append(f"the message {message!r}")
        if wrong:
            self.faults += [f"{path}: {each}" for each in wrong]
            raise Denied(400, "; ".join(wrong))

    def model(self, name: str) -> dict[str, Any]:
        if name not in self.models:
            raise Denied(404, f"model '{name}' not found")
        return self.models[name]

    def create(self, body: Any) -> Any:
        files = body.get("files")
        if not files:
            raise Denied(400, "neither 'from' or 'files' was specified")
        for file, digest in files.items():
            if "/" in file:
                raise Denied(400, f"'{file}' is no file name")
            _check_gguf(self.blob(digest))
        try:
            gotext.Template(body.get("template", ""))
        except gotext.GoError as error:
            raise Denied(400, f"template error: {error}") from None
        self.models[body["model"]] = body
        return {"status": "success"}

    def show(self, body: Any) -> Any:
        made = self.model(body["model"])
        (digest,) = made["files"].values()
        info: dict[str, Any] = {**gguf_header.read(self.blob(digest)), "tokenizer.ggml.tokens": None}
        if body.get("verbose"):
            info["tokenizer.ggml.tokens"] = ["x"] * self.vocabulary
        info.pop("tokenizer.chat_template", None)
        return {
            "template": made.get("template", "{{ .Prompt }}"),
            "system": made.get("system", ""),
            "license": "\n".join(made.get("license", [])),
            "parameters": "\n".join(_shown(name, value) for name, value in (made.get("parameters") or {}).items()),
            "details": {"format": "gguf", "family": info.get("general.architecture", "")},
            "model_info": info,
            "tensors": [{"name": name, "type": "F16", "shape": [1]} for name in self.tensors],
            "capabilities": ["completion"],
        }

    def chat(self, body: Any) -> Any:
        name = body["model"]
        made = self.model(name)
        if body.get("tools"):
            raise Denied(400, f"registry.ollama.ai/library/{name} does not support tools")
        if body.get("think"):
            raise Denied(400, f'"{name}" does not support thinking')
        if not body["messages"]:
            return {**self.load(body), "message": {"role": "assistant", "content": ""}}
        self.loaded.add(name)
        try:
            prompt = gotext.render(made["template"], body["messages"], system=made.get("system"))
        except gotext.GoError as error:
            raise Denied(500, f'template: :1:12: executing "" at <.>: {error}') from None
        if body.get("_debug_render_only") and self.version_number >= (0, 11, 5):
            empty = {"role": "", "content": ""}
            return {
                "model": body["model"], "message": empty, "done": False, "_debug_info": {"rendered_template": prompt}
            }  # fmt: skip
        made = self.complete(body, prompt)
        return {**made, "message": {"role": "assistant", "content": made.pop("response")}}

    def generate(self, body: Any) -> Any:
        self.model(body["model"])
        if not body.get("prompt"):
            return {**self.load(body), "response": ""}
        if body.get("raw") and (body.get("template") or body.get("system") or body.get("context")):
            raise Denied(400, "raw mode does not support template, system, or context")
        self.loaded.add(body["model"])
        return self.complete(body, body["prompt"])

    def load(self, body: Any) -> dict[str, Any]:
        """Into memory, or out of it, without a word."""
        unload = body.get("keep_alive") == 0
        (self.loaded.discard if unload else self.loaded.add)(body["model"])
        return {"model": body["model"], "done": True, "done_reason": "unload" if unload else "load"}

    def complete(self, body: Any, prompt: str) -> dict[str, Any]:
        """Words stand for the tokens of the prompt, pieces for those of the answer."""
        options = {**(self.model(body["model"]).get("parameters") or {}), **(body.get("options") or {})}
        words, room = prompt.split(), options.get("num_ctx", CONTEXT)
        if len(words) > room:
            if body.get("truncate") is False:
                raise Denied(400, "the input length exceeds the context length")
            words = words[-room:]
            prompt = " ".join(words)
        text, reason, made = "", "length", 0
        for piece in self.answer(prompt):
            if 0 < options.get("num_predict", -1) == made:
                break
            made += 1
            text += piece
            ends = [text.index(stop) for stop in options.get("stop", []) if stop in text]
            if ends:
                text, reason = text[: min(ends)], "stop"
                break
        return {"model": body["model"], "response": text, "done": True, "done_reason": reason,
                "prompt_eval_count": len(words), "eval_count": made}  # fmt: skip

    def delete(self, body: Any) -> Any:
        self.model(body["model"])
        del self.models[body["model"]]
        used = {digest for made in self.models.values() for digest in made["files"].values()}
        for file in self.folder.glob("sha256-*"):
            if file.name.replace("-", ":", 1) not in used:
                file.unlink()
        return {}

    @property
    def version_number(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))


def _check_gguf(blob: Path) -> None:
    """What Ollama looks at before it takes a file for a model."""
    if not blob.is_file():
        raise Denied(500, f"open {blob}: no such file or directory")
    if blob.read_bytes()[:4] != b"GGUF":
        raise Denied(400, "supplied file was not in GGUF format")
    size = blob.stat().st_size
    try:
        tensors = list(small_gguf.ends(blob))
    except (struct.error, ValueError):
        raise Denied(500, "unexpected EOF") from None
    for name, end in tensors:
        if end > size:
            raise Denied(500, f'tensor "{name}" offset+size ({end}) exceeds file size ({size})')


def _shown(name: str, value: Any) -> str:
    """A parameter as `/api/show` writes it: one line a value, texts in quotes."""
    values = value if isinstance(value, list) else [value]
    return "\n".join(f"{name:<30} {json.dumps(each, ensure_ascii=False)}" for each in values)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = None) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        if self.server.ollama.cut == self.path:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        ollama, data = self.server.ollama, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._answer(*self._route(ollama, data))
        except Denied as denied:
            self._answer(denied.status, {"error": denied.error})

    do_GET = do_HEAD = do_POST = do_DELETE = _serve

    def _route(self, ollama: Ollama, data: bytes) -> tuple[int, Any]:
        if self.path.startswith("/api/blobs/sha256:"):
            digest = self.path.removeprefix("/api/blobs/")
            ollama.requests.append((self.command, "/api/blobs", digest))
            if self.command == "HEAD":
                return (200 if ollama.blob(digest).is_file() else 404), None
            if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
                raise Denied(400, "digest mismatch")
            ollama.blob(digest).write_bytes(data)
            return 201, None
        body = json.loads(data) if data else None
        ollama.requests.append((self.command, self.path, body))
        if (self.command, self.path) == ("GET", "/api/version"):
            return 200, {"version": ollama.version}
        if (self.command, self.path) == ("GET", "/api/tags"):
            return 200, {"models": [{"name": name, "model": name} for name in ollama.models]}
        verb = "DELETE" if self.path == "/api/delete" else "POST"
        if self.path not in FIELDS or self.command != verb or not isinstance(body, dict):
            ollama.faults.append(f"{self.command} {self.path}")
            raise Denied(404, "404 page not found")
        ollama.check(self.path, body)
        if body.get("stream") is not False and self.path not in ("/api/show", "/api/delete"):
            ollama.faults.append(f"{self.path} asks for a stream")
        return 200, getattr(ollama, self.path.removeprefix("/api/"))(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    ollama: Ollama


@contextmanager
def serve(folder: Path, **settings: Any) -> Iterator[Ollama]:
    """Run the stand-in. At the end every request must have been one that Ollama knows."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.ollama = ollama = Ollama(folder, **settings)
    ollama.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield ollama
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not ollama.faults, ollama.faults


class Letters:
    """A tokenizer of bytes and a few special tokens, as the GGUF file's own would be."""

    def __init__(self, *, template: str | None = None, bos: str | None = None, adds_bos: bool = False) -> None:
        self.special = ("<|im_end|>", "<|im_start|>", *([bos] if bos else []))
        self.eos_token, self.bos_token, self.adds_bos, self.chat_template = "<|im_end|>", bos, adds_bos, template
        self.eos_ids = (256,)
        self.bos_id = 256 + self.special.index(bos) if bos else None
        self.vocab_size = 256 + len(self.special)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            word = next((each for each in self.special if text.startswith(each)), None)
            ids += [256 + self.special.index(word)] if word else list(text[0].encode())
            text = text[len(word or " ") :]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        parts = (bytes([i]) if i < 256 else b"" if skip_special else self.special[i - 256].encode() for i in ids)
        return b"".join(parts).decode("utf-8", "replace")
