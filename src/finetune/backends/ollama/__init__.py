"""The backend for Ollama, over its HTTP API. A model is a Modelfile with its GGUF file beside it.

Every handle is a model of its own on the server, `finetune-<digest>:<mark>`, gone again when the handle is closed, no
longer used, or the process ends; the server keeps the GGUF file only as long as a model names it. Ollama takes and
gives text, so ids are those of the GGUF file's own tokenizer.
"""

from __future__ import annotations

import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation, InferenceOnly
from finetune.backends.ollama import modelfile
from finetune.backends.ollama.api import Client, Refused
from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError, first_line
from finetune.core.files import digest
from finetune.data.tokenizer import Tokenizer

RENDERS = (0, 11, 5)  # the first version that tells the prompt it renders
# Greedy, whatever the Modelfile or the server's version has for a default.
GREEDY = {
    "temperature": 0.0, "seed": 0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
# What no tokens are: asked for none (`num_predict: 0`), Ollama answers to the end of the context.
NOTHING = Generation(ids=(), text="", finish="length")
TEXTS = ("stop",)
FLOATS = (
    "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
INTEGERS = (
    "num_ctx", "num_keep", "num_predict", "num_batch", "num_gpu", "num_thread", "seed", "top_k", "repeat_last_n",
)  # fmt: skip


def unavailable() -> str | None:
    """None where an Ollama server answers, else why none does and how to get one."""
    try:
        Client().version()
    except FinetuneError as error:
        return str(error)
    return None


class Handle:
    """A model on the server, to be used in a `with` block or closed; closing takes it off the server."""

    def __init__(self, client: Client, name: str, gguf: Path) -> None:
        self.client, self.name, self.gguf = client, name, gguf
        self.close = weakref.finalize(self, _remove, client, name)
        self.tokenizer = _tokenizer(gguf)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def _remove(client: Client, name: str) -> None:
    with suppress(FinetuneError):  # a server that has gone meanwhile takes nothing with it that matters here
        client.delete(name)


class OllamaBackend(InferenceOnly):
    name = "ollama"
    scores = False

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        found: Tokenizer = _tokenizer(_read(model)[1])
        return found

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> Handle:
        """Create the model on the server. Settings: `host`, as in OLLAMA_HOST. Raises MissingError without a server."""
        if adapter is not None:
            raise UsageError(f"'{self.name}' runs merged models; merge the adapter first (finetune merge)")
        commands, gguf = _read(model)
        client = Client(settings.get("host"))
        client.version()
        sha256 = f"sha256:{digest(gguf)}"
        name = f"finetune-{sha256[7:19]}:{secrets.token_hex(4)}"
        client.upload(gguf, sha256)
        try:
            client.call("POST", "/api/create", {**_request(commands, gguf, sha256), "model": name, "stream": False})
            return Handle(client, name, gguf)
        except BaseException:  # Ctrl-C too: the server goes on creating what nobody waits for
            _remove(client, name)
            raise

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        raise self._silent()

    def distributions(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        raise self._silent()

    def generate(self, handle: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Greedy continuation. A prompt goes as text, less the begin token where the server puts it there itself; it
        stops at the Modelfile's stop texts too."""
        return [_generate(handle, prompt, max_new_tokens) for prompt in prompts]

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        """The prompts that the server makes of `/api/chat`'s messages with the model's TEMPLATE and SYSTEM."""
        with self.load(model) as handle:
            version = handle.client.version()
            if _number(version) < RENDERS:
                newer = ".".join(map(str, RENDERS))
                return [f"Ollama {version} does not tell the prompt it renders; {newer} and later do"] * len(
                    conversations
                )
            return [_render(handle, messages) for messages in conversations]

    def chat(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_new_tokens: int
    ) -> list[Generation]:
        """Greedy answers of `/api/chat`."""
        with self.load(model) as handle:
            return [_chat(handle, messages, max_new_tokens) for messages in conversations]

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        """What `/api/show` tells; Ollama's own defaults for what the file leaves out are not among it."""
        with self.load(model) as handle:
            return _constants(handle)

    def _silent(self) -> UsageError:
        return UsageError(
            "Ollama does not tell the probabilities of given tokens; compare what it generates, or score the GGUF file "
            "with the backend 'llamacpp'"
        )


def _tokenizer(gguf: Path) -> Any:
    from finetune.backends.llamacpp.loading import tokenizer

    return tokenizer(gguf)


def _read(model: Path) -> tuple[list[modelfile.Command], Path]:
    """The Modelfile's commands, and the GGUF file that it names."""
    file = model / "Modelfile" if model.is_dir() else model
    if not file.is_file():
        raise MissingError(f"no Modelfile at {file}. Write one with: finetune export RUN --to ollama")
    commands = modelfile.parse(file.read_text(encoding="utf-8"))
    gguf = file.parent / next(value for name, value in commands if name == "from")
    if not gguf.is_file():
        raise MissingError(f"{file} names {gguf.name}, which is not beside it")
    return commands, gguf


def _request(commands: Sequence[modelfile.Command], gguf: Path, sha256: str) -> dict[str, Any]:
    """What `ollama create` would send for the Modelfile."""
    request: dict[str, Any] = {"files": {gguf.name: sha256}}
    parameters: dict[str, Any] = {}
    for name, value in commands:
        if name in ("template", "system"):
            request[name] = value
        elif name == "license":
            request.setdefault("license", []).append(value)
        elif name in TEXTS:
            parameters.setdefault(name, []).append(value)
        elif name in INTEGERS or name in FLOATS:
            parameters[name] = _as_number(name, value)
        elif name != "from":
            raise UsageError(f"the Modelfile's '{name}' is not known here; create that model with: ollama create")
    return {**request, "parameters": parameters} if parameters else request


def _as_number(name: str, value: str) -> int | float:
    try:
        return int(value) if name in INTEGERS else float(value)
    except ValueError:
        raise UsageError(f"the Modelfile's PARAMETER {name} is '{value}', which is no number") from None


def _generate(handle: Handle, prompt: Sequence[int], most: int) -> Generation:
    if most < 1:
        return NOTHING
    tokenizer = handle.tokenizer
    ids = list(prompt)
    if getattr(tokenizer, "adds_bos", False):
        if ids[:1] != [tokenizer.bos_id]:
            raise UsageError("Ollama puts a begin token before every prompt of this model, and this prompt has none")
        ids = ids[1:]
    if not ids:
        raise UsageError("a prompt without tokens cannot be continued by Ollama")
    body = {
        "model": handle.name,
        "prompt": tokenizer.decode(ids),
        "raw": True,
        "stream": False,
        "truncate": False,  # a prompt too long is an error, not another prompt
        "shift": False,
        "options": {**GREEDY, "num_predict": most},
    }
    answer = handle.client.call("POST", "/api/generate", body)
    text = answer.get("response")
    if not isinstance(text, str) or not answer.get("done"):
        raise StageError(f"Ollama gave no answer to a prompt of {len(ids)} tokens: {answer}")
    # A character that was cut in two comes back as U+FFFD, which has more tokens than the part had.
    made = tokenizer.encode(text)[:most]
    return Generation(ids=tuple(made), text=text, finish="length" if answer.get("done_reason") == "length" else "stop")


def _chat(handle: Handle, messages: Sequence[Mapping[str, str]], most: int) -> Generation:
    if most < 1:
        return NOTHING
    body = {
        "model": handle.name,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        "stream": False,
        "options": {**GREEDY, "num_predict": most},
    }
    answer = handle.client.call("POST", "/api/chat", body)
    text = (answer.get("message") or {}).get("content")
    if not isinstance(text, str) or not answer.get("done"):
        raise StageError(f"Ollama gave no answer to a conversation of {len(messages)} messages: {answer}")
    return Generation(ids=(), text=text, finish="length" if answer.get("done_reason") == "length" else "stop")


def _render(handle: Handle, messages: Sequence[Mapping[str, str]]) -> list[int] | str:
    body = {
        "model": handle.name,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        "stream": False,
        "truncate": False,
        "_debug_render_only": True,
    }
    try:
        answer = handle.client.call("POST", "/api/chat", body)
    except Refused as refused:
        return first_line(UsageError(refused.reason))
    text = (answer.get("_debug_info") or {}).get("rendered_template")
    if not isinstance(text, str):
        return f"Ollama {handle.client.version()} does not tell the prompt it renders"
    begin = [handle.tokenizer.bos_id] if getattr(handle.tokenizer, "adds_bos", False) else []
    return [*begin, *handle.tokenizer.encode(text)]


def _constants(handle: Handle) -> dict[str, Constant]:
    from finetune.backends.llamacpp.reading import KEYS, plain

    shown = handle.client.call("POST", "/api/show", {"model": handle.name})
    info = shown.get("model_info") or {}
    architecture = info.get("general.architecture")
    names = {
        **{name: [f"{architecture}.{key}" for key in keys] for name, keys in KEYS.items()},
        "rope_theta": [f"{architecture}.rope.freq_base"],
        "vocab_size": [f"{architecture}.vocab_size"],
        "eos_token_id": ["tokenizer.ggml.eos_token_id"],
        "bos_token_id": ["tokenizer.ggml.bos_token_id"],
        "add_bos_token": ["tokenizer.ggml.add_bos_token"],
    }
    found = {name: next((info[key] for key in keys if key in info), None) for name, keys in names.items()}
    if not found["vocab_size"]:
        full = handle.client.call("POST", "/api/show", {"model": handle.name, "verbose": True})
        found["vocab_size"] = len(full.get("model_info", {}).get("tokenizer.ggml.tokens") or []) or None
    if tensors := shown.get("tensors"):
        found["tie_word_embeddings"] = all(tensor.get("name") != "output.weight" for tensor in tensors)
    return {name: plain(value) for name, value in found.items() if isinstance(value, int | float | str)}


def _number(version: str) -> tuple[int, ...]:
    """A version to compare; one built from source calls itself 0.0.0 and is taken for the newest."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return found if any(found) else (999,)
