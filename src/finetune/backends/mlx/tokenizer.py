"""Text to ids as mlx-lm does it: transformers' tokenizer, mlx-lm's choice of end-of-turn tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from finetune.backends.mlx.runtime import mx  # noqa: F401 (before mlx_lm imports it)
from finetune.backends.torch.tokenizer import HFTokenizer, reading
from finetune.core.errors import StageError, first_line


class MlxTokenizer(HFTokenizer):
    """See finetune.backends.Tokenizer. `eos_ids` are what mlx-lm stops at: generation_config.json's before
    config.json's, and the tokenizer's own."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(directory, trust_remote_code=trust_remote_code)
        self.eos_ids = tuple(dict.fromkeys([self.hf.eos_token_id, *sorted(declared_eos_ids(directory))]))


def declared_eos_ids(directory: Path) -> set[int]:
    """The end-of-turn ids in the configs, as mlx-lm reads them; of an adapter, in those of its base."""
    from mlx_lm.utils import load_config

    adapter = directory / "adapter_config.json"
    if adapter.is_file() and not (directory / "config.json").exists():
        directory = Path(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    try:
        declared = load_config(directory).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise StageError(f"no usable config.json in {directory}: {first_line(error)}") from None
    return set() if declared is None else {declared} if isinstance(declared, int) else set(declared)


def wrapped(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """mlx-lm's own tokenizer, as its server and its command line load it."""
    from mlx_lm.utils import load_tokenizer

    with reading(directory, "tokenizer for mlx-lm", trust_remote_code):
        return load_tokenizer(
            directory,
            tokenizer_config_extra={"trust_remote_code": trust_remote_code},
            eos_token_ids=declared_eos_ids(directory) or None,
        )


def render(
    model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
) -> list[list[int] | str]:
    """The ids that mlx_lm.server prompts the model with, or the template's refusal."""
    tokenizer = wrapped(model, trust_remote_code=trust_remote_code)
    rendered: list[list[int] | str] = []
    for messages in conversations:
        try:
            rendered.append([int(token) for token in _prompt(tokenizer, [dict(message) for message in messages])])
        except (TemplateError, ValueError) as error:
            rendered.append(first_line(error))
    return rendered


def _prompt(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    if tokenizer.has_chat_template:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    from mlx_lm.server import convert_chat

    return tokenizer.encode(convert_chat(messages))
