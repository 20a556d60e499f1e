"""GGUF files into llama.cpp: the model, its tokenizer, and the handle that inference works with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.core.errors import MissingError, StageError, UsageError
from finetune.core.install import install

INSTALL = f"Install it with: {install('gguf')}"
SENTENCEPIECE, BPE = 1, 2  # llama_vocab_type
ERROR = 4  # ggml_log_level
BYTE = 1 << 5  # LLAMA_TOKEN_ATTR_BYTE: a token that stands for one byte
F32 = 0  # ggml_type


@lru_cache(maxsize=1)
def library() -> Any:
    """The bindings, with llama.cpp's log off. Raises MissingError where they are not installed."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion in llama.cpp would start a debugger
    try:
        from cyllama.llama import llama_cpp
    except ImportError as error:
        raise MissingError(f"the Python package 'cyllama' (llama.cpp) is not there: {error}. {INSTALL}") from None
    llama_cpp.disable_logging()
    return llama_cpp


@lru_cache(maxsize=1)
def _model_class() -> Any:
    class Model(library().LlamaModel):  # type: ignore[misc]
        @property
        def n_vocab(self) -> int:  # get_logits_ith of cyllama 0.2.18 asks the model, which does not know it
            return int(self.get_vocab().n_vocab)

    return Model


def load_model(gguf: Path, *, gpu_layers: int = 0) -> Any:
    """A GGUF file in llama.cpp, its weights mapped from the file. Raises StageError with llama.cpp's own reason.

    On the CPU unless layers are given to an accelerator, so that what is compared is the file and not its rounding.
    """
    if not gguf.is_file():
        raise MissingError(f"no GGUF file at {gguf}")
    llama = library()
    said: list[str] = []
    llama.set_log_callback(lambda level, text: said.append(str(text)) if level == ERROR else None)
    parameters = llama.LlamaModelParams()
    parameters.n_gpu_layers = gpu_layers
    try:
        return _model_class()(path_model=str(gguf), params=parameters, verbose=False)
    except (ValueError, OSError, RuntimeError) as error:
        reason = next((line.strip() for line in said if line.strip()), str(error).partition(". ")[0])
        raise StageError(f"llama.cpp cannot load {gguf}: {reason.rpartition(': error ')[2]}") from None
    finally:
        llama.disable_logging()


class GGUFTokenizer:
    """Text to ids and back, by the vocabulary inside a GGUF file. `eos_ids` are all ids at which llama.cpp stops."""

    def __init__(self, model: Any) -> None:
        self._model = model  # the vocabulary lives as long as its model
        self._vocab = vocab = model.get_vocab()
        self.vocab_size = int(vocab.n_vocab)
        own = int(vocab.token_eos())
        ends = [token for token in range(self.vocab_size) if vocab.is_eog(token)]
        self.eos_ids = tuple(sorted(ends, key=lambda token: (token != own, token)))
        self.eos_token = self._text(own)
        bos = int(vocab.token_bos())
        self.bos_id = bos if 0 <= bos < self.vocab_size and vocab.is_control(bos) else None
        self.bos_token = None if self.bos_id is None else self._text(self.bos_id)
        self.adds_bos = bool(vocab.get_add_bos())
        try:
            self.chat_template: str | None = model.meta_val_str("tokenizer.chat_template") or None
        except (ValueError, KeyError, RuntimeError):
            self.chat_template = None
        self.leading_space = vocab.vocab_type == SENTENCEPIECE and self._adds_space()

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._vocab.tokenize(text, False, True)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        data = b"".join(self._bytes(token) for token in ids if not (skip_special and self.is_special(token)))
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.leading_space else text

    def is_special(self, token: int) -> bool:
        return bool(self._vocab.is_control(token))

    def ends_turn(self, token: int) -> bool:
        """llama.cpp's own rule."""
        return bool(self._vocab.is_eog(token))

    def _text(self, token: int) -> str:
        return str(self._vocab.token_to_piece(token, 0, True)) if 0 <= token < self.vocab_size else ""

    def _bytes(self, token: int) -> bytes:
        piece = str(self._vocab.token_to_piece(token, 0, True))
        if "�" not in piece:
            return piece.encode()
        text = str(self._vocab.get_text(token))  # a part of a character, which the bindings cannot hand out as text
        if self._vocab.get_attr(token) & BYTE:
            return bytes([int(text[3:5], 16)])  # <0xE2>
        letters = _byte_letters()
        return bytes(letters[letter] for letter in text) if set(text) <= letters.keys() else text.encode()

    def _adds_space(self) -> bool:
        (first, *_) = self._vocab.tokenize("a", False, False)
        return self._text(first).startswith(" ")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's letter of every byte: printable Latin-1 for itself, the rest from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{chr(byte): byte for byte in own}, **{chr(256 + place): byte for place, byte in enumerate(others)}}


class Handle:
    """A loaded model; opaque outside this package. `context` is made when it is known how long the inputs are."""

    def __init__(self, model: Any, *, threads: int | None = None, n_ctx: int = 0) -> None:
        self.model = model
        self.tokenizer = GGUFTokenizer(model)
        self.threads = threads or default_threads()
        self.least = n_ctx
        self.context: Any = None
        self.cached: list[int] = []  # the ids of the leading whole blocks in the key-value cache

    def reserve(self, tokens: int, batch: int) -> Any:
        """A context that holds `tokens` positions; the one there, or a longer one in its place."""
        if self.context is not None and self.context.n_ctx >= tokens:
            return self.context
        if self.context is not None:
            self.context.close()
        parameters = library().LlamaContextParams()
        parameters.n_ctx = -(-max(tokens, self.least) // 256) * 256
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = 0
        parameters.type_k = parameters.type_v = F32  # llama.cpp's default rounds keys and values to 16 bits
        parameters.swa_full = True  # a pruned cache of a sliding window could not go back to a common prefix
        self.cached = []
        self.context = library().LlamaContext(self.model, parameters, verbose=False)
        return self.context


def default_threads() -> int:
    """OMP_NUM_THREADS, else one less than there are cores: llama.cpp's threads wait for each other spinning, and with a
    busy neighbour and no core to spare a token takes 30 times as long."""
    declared = os.environ.get("OMP_NUM_THREADS", "")
    if declared.isdigit() and int(declared):
        return int(declared)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def tokenizer(gguf: Path) -> GGUFTokenizer:
    """The tokenizer in a GGUF file."""
    return GGUFTokenizer(load_model(gguf))


def load_for_inference(
    gguf: Path,
    adapter: Path | None = None,
    *,
    threads: int | None = None,
    n_ctx: int = 0,
    gpu_layers: int = 0,
    **_: Any,
) -> Handle:
    """A handle for `score`, `distributions` and `generate`; settings of other backends (dtype, device) change nothing."""
    if adapter is not None:
        raise UsageError(
            f"the backend 'llamacpp' runs whole models and takes no adapter ({adapter}); merge it first: finetune merge"
        )
    return Handle(load_model(gguf, gpu_layers=gpu_layers), threads=threads, n_ctx=n_ctx)
