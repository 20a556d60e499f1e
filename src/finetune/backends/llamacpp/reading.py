"""What llama.cpp makes of a GGUF file's template and constants."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation
from finetune.backends.llamacpp.loading import GGUFTokenizer, library, load_model
from finetune.backends.llamacpp.server import serve
from finetune.core.errors import StageError

# Hugging Face's names of GGUF metadata keys, which carry the architecture's name before them.
KEYS = {
    "hidden_size": ("embedding_length",),
    "num_hidden_layers": ("block_count",),
    "num_attention_heads": ("attention.head_count",),
    "num_key_value_heads": ("attention.head_count_kv", "attention.head_count"),
    "head_dim": ("attention.key_length",),
    "intermediate_size": ("feed_forward_length",),
    "max_position_embeddings": ("context_length",),
    "norm_eps": ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
    "sliding_window": ("attention.sliding_window",),
}
ROPE_BASE = 10000.0  # llama.cpp's own where the file names none
NO_ROPE = -1  # llama_rope_type
IGNORES_WINDOW = ("phi3",)  # architectures whose window llama.cpp reads and switches off


def constants(gguf: Path) -> dict[str, Constant]:
    """The constants llama.cpp runs the file with: those in its metadata, and llama.cpp's own for those that are not."""
    model = load_model(gguf)
    tokenizer = GGUFTokenizer(model)
    file = library().GGUFContext.from_file(str(gguf))
    architecture = str(file.get_value("general.architecture"))

    def value(*names: str) -> Any:
        for name in names:
            if file.find_key(f"{architecture}.{name}") >= 0:
                return plain(file.get_value(f"{architecture}.{name}"))
        return None

    found: dict[str, Constant] = {name: value(*keys) for name, keys in KEYS.items()}
    heads, size = found["num_attention_heads"], found["hidden_size"]
    if found["head_dim"] is None and isinstance(heads, int) and isinstance(size, int):
        found["head_dim"] = size // heads
    if int(model.rope_type) != NO_ROPE:
        found["rope_theta"] = value("rope.freq_base") or ROPE_BASE
    if architecture in IGNORES_WINDOW or not found["sliding_window"]:
        found["sliding_window"] = None
    found["vocab_size"] = tokenizer.vocab_size
    found["tie_word_embeddings"] = file.find_tensor("output.weight") < 0
    found["eos_token_id"] = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    found["bos_token_id"] = tokenizer.bos_id
    found["add_bos_token"] = tokenizer.adds_bos
    return {name: constant for name, constant in found.items() if constant is not None}


def weight_bytes(gguf: Path) -> int:
    """Bytes of all tensors in the file."""
    file = library().GGUFContext.from_file(str(gguf))
    return sum(int(file.get_tensor_size(number)) for number in range(file.n_tensors))


def plain(value: Any) -> Any:
    """Float32 metadata as the shortest decimal that it is (1e-05, not 9.999999747378752e-06)."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def render(gguf: Path, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int] | str]:
    """The ids with which llama.cpp's server would prompt the model: its own Jinja engine, then its own tokenizer,
    which adds a begin token where the file says so. A template's refusal is its text."""
    with serve(gguf, n_ctx=256) as address:
        return [_prompt(address, messages) for messages in conversations]


def chat(gguf: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_new_tokens: int) -> list[Generation]:
    """Greedy answers of llama.cpp's OpenAI-compatible server. Raises StageError where it refuses, or is gone."""
    answers = []
    with serve(gguf, n_ctx=0) as address:
        for messages in conversations:
            body = {"messages": [dict(message) for message in messages], "temperature": 0, "max_tokens": max_new_tokens}
            try:
                (choice,) = _post(f"{address}/v1/chat/completions", body)["choices"]
            except urllib.error.HTTPError as error:
                why = _refusal(error.read().decode("utf-8", "replace"))
                raise StageError(f"llama.cpp's server refuses to answer: {why}") from None
            except OSError as error:  # the process has ended, or does not answer in time
                raise StageError(f"llama.cpp's server does not answer: {error}") from None
            text = choice["message"].get("content") or ""
            answers.append(Generation(ids=(), text=text, finish=choice["finish_reason"]))
    return answers


def _prompt(address: str, messages: Sequence[Mapping[str, str]]) -> list[int] | str:
    try:
        text = _post(f"{address}/apply-template", {"messages": [dict(message) for message in messages]})["prompt"]
        found = _post(f"{address}/tokenize", {"content": text, "add_special": True, "parse_special": True})
    except urllib.error.HTTPError as error:
        return _refusal(error.read().decode("utf-8", "replace"))
    return [int(token) for token in found["tokens"]]


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def _refusal(body: str) -> str:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[-1] if lines else "refused without a reason"
