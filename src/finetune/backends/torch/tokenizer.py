"""The tokenizer of a Hugging Face model directory, behind the protocol."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils
from transformers.utils import logging as transformers_logging

from finetune.data.sandbox import BoundedEnvironment
from finetune.errors import MissingError, StageError, UsageError, first_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
LIBRARIES = r"(transformers|peft|trl|accelerate|datasets|torch)(\.|$)"

# transformers renders with jinja2's own sandbox, in which a model's template may take all memory and time.
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
transformers_logging.disable_progress_bar()
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()


def quiet() -> None:
    """Keep libraries' warnings, which speak to programmers, from the user; PYTHONWARNINGS brings them back."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=LIBRARIES)
        warnings.filterwarnings("ignore", message=".*label_smoothing_factor.*", category=FutureWarning)


class HFTokenizer:
    """Text to ids and back. `hf` is the wrapped tokenizer, for code behind the backend line."""

    def __init__(self, directory: Path) -> None:
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise MissingError(f"{directory} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise StageError(f"no usable tokenizer in {directory}: {first_line(error)}") from None
        if self.hf.eos_token is None:
            raise StageError(
                f"the tokenizer in {directory} has no end-of-text token (eos_token); set one in its config"
            )
        if self.hf.pad_token is None:
            self.hf.pad_token = self.hf.eos_token
        self.eos_token: str = self.hf.eos_token
        self.bos_token: str | None = self.hf.bos_token
        self.chat_template: str | None = self.hf.chat_template
        self.vocab_size = len(self.hf)
        self.eos_ids = _eos_ids(directory, self.hf.eos_token_id)
        with_special = self.hf.encode("a")
        self.adds_bos = bool(with_special) and with_special[0] == self.hf.bos_token_id is not None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return ids

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, and where in the text (characters) each token begins and ends."""
        if not self.hf.is_fast:
            raise UsageError(
                f"{type(self.hf).__name__} does not tell where its tokens are in a text; take another model"
            )
        found = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], [tuple(span) for span in found["offset_mapping"]]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        text: str = self.hf.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text


def _eos_ids(directory: Path, own: int) -> tuple[int, ...]:
    """The tokenizer's end-of-turn id and those that generation stops at (Llama 3 has two)."""
    path = directory / "generation_config.json"
    declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    more = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys([own, *more]))
