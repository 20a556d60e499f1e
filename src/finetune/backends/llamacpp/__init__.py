"""llama.cpp on GGUF files: `cyllama` (prebuilt bindings) computes in this process, its server (`xllamacpp`) renders in
one of its own.

This file only names the verbs; each lives in a module of its own and is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation, InferenceOnly
from finetune.core.lookup import load as load_reference
from finetune.data.tokenizer import Tokenizer


class LlamaCppBackend(InferenceOnly):
    name = "llamacpp"
    scores = True

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        return load_reference("finetune.backends.llamacpp.loading:tokenizer")(model)  # type: ignore[no-any-return]

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> Any:
        return load_reference("finetune.backends.llamacpp.loading:load_for_inference")(model, adapter, **settings)

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return load_reference("finetune.backends.llamacpp.inference:score")(handle, pairs)  # type: ignore[no-any-return]

    def distributions(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        load_reference("finetune.backends.llamacpp.inference:distributions")(handle, pairs, out)

    def generate(self, handle: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        generate = load_reference("finetune.backends.llamacpp.inference:generate")
        return generate(handle, prompts, max_new_tokens=max_new_tokens)  # type: ignore[no-any-return]

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        return load_reference("finetune.backends.llamacpp.reading:render")(model, conversations)  # type: ignore[no-any-return]

    def chat(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_new_tokens: int
    ) -> list[Generation]:
        chat = load_reference("finetune.backends.llamacpp.reading:chat")
        return chat(model, conversations, max_new_tokens=max_new_tokens)  # type: ignore[no-any-return]

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        return load_reference("finetune.backends.llamacpp.reading:constants")(model)  # type: ignore[no-any-return]
