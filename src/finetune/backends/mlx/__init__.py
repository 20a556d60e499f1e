"""Apple's MLX through mlx-lm: on Apple silicon's GPU, and on the CPU elsewhere.

This file only names the verbs; each lives in a module of its own and is imported when it is called. A model is an MLX
directory, read as mlx-lm reads it, or a Hugging Face directory, whose config is mended in memory (see config.py).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation, Job, Step, TensorFacts
from finetune.core.errors import MissingError
from finetune.core.install import install
from finetune.core.lookup import load as load_reference
from finetune.data.tokenizer import Tokenizer

INSTALL = f"MLX is not installed. Install it with: {install('mlx')}"


class MlxBackend:
    name = "mlx"
    trains = True
    scores = True
    checkpoint_files = ("optimizer/state.safetensors",)

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        return _verb("tokenizer:MlxTokenizer")(model, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> Any:
        return _verb("loading:load_for_inference")(model, adapter, **settings)

    def train(self, job: Job) -> Generator[Step, None, dict[str, Any]]:
        return _verb("training:train")(job)  # type: ignore[no-any-return]

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return _verb("inference:score")(handle, pairs)  # type: ignore[no-any-return]

    def distributions(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        _verb("inference:distributions")(handle, pairs, out)

    def generate(self, handle: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        return _verb("inference:generate")(handle, prompts, max_new_tokens=max_new_tokens)  # type: ignore[no-any-return]

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        return _verb("tokenizer:render")(model, conversations, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        return _verb("config:constants")(model, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    def merge(self, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        return _verb("merging:merge")(model, adapter, out, **settings)  # type: ignore[no-any-return]

    def tensors(self, directory: Path) -> dict[str, TensorFacts]:
        return _verb("tensors:read")(directory)  # type: ignore[no-any-return]


def _verb(reference: str) -> Any:
    try:
        return load_reference(f"finetune.backends.mlx.{reference}")
    except MissingError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and not str(error.__cause__.name).startswith("finetune"):
            raise MissingError(INSTALL) from error
        raise
