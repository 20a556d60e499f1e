"""PyTorch on CUDA, Apple's MPS or the CPU: transformers models, PEFT adapters, TRL trainers.

This file only names the verbs; each lives in a module of its own and is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation, Job, Step, TensorFacts
from finetune.core.lookup import load as load_reference
from finetune.data.tokenizer import Tokenizer


class TorchBackend:
    name = "torch"
    trains = True
    scores = True
    checkpoint_files = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        read = load_reference("finetune.backends.torch.tokenizer:HFTokenizer")
        return read(model, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> Any:
        return load_reference("finetune.backends.torch.loading:load_for_inference")(model, adapter, **settings)

    def train(self, job: Job) -> Generator[Step, None, dict[str, Any]]:
        return load_reference("finetune.backends.torch.training:train")(job)  # type: ignore[no-any-return]

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return load_reference("finetune.backends.torch.inference:score")(handle, pairs)  # type: ignore[no-any-return]

    def distributions(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        load_reference("finetune.backends.torch.inference:distributions")(handle, pairs, out)

    def generate(self, handle: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        generate = load_reference("finetune.backends.torch.inference:generate")
        return generate(handle, prompts, max_new_tokens=max_new_tokens)  # type: ignore[no-any-return]

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        render = load_reference("finetune.backends.torch.reading:render")
        return render(model, conversations, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        constants = load_reference("finetune.backends.torch.reading:constants")
        return constants(model, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def merge(self, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        return load_reference("finetune.backends.torch.merging:merge")(model, adapter, out, **settings)  # type: ignore[no-any-return]

    def tensors(self, directory: Path) -> dict[str, TensorFacts]:
        return load_reference("finetune.backends.torch.tensors:read")(directory)  # type: ignore[no-any-return]
