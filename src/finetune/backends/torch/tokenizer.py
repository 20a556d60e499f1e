"""The tokenizer of a Hugging Face model directory, behind the protocol."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils
from transformers.utils import chat_template_utils
from transformers.utils import logging as transformers_logging

from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError, first_line
from finetune.core.files import read_object
from finetune.data.sandbox import BoundedEnvironment
from finetune.models import files

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
LIBRARIES = r"(transformers|peft|trl|accelerate|datasets|torch)(\.|$)"

# transformers renders with jinja2's own sandbox, in which a model's template may take all memory and time.
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
transformers_logging.disable_progress_bar()
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # a library that says nothing of trust would ask on a terminal, and wait
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()


def quiet() -> None:
    """Keep libraries' warnings, which speak to programmers, from the user; PYTHONWARNINGS brings them back."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=LIBRARIES)
        warnings.filterwarnings("ignore", message=".*label_smoothing_factor.*", category=FutureWarning)


@contextmanager
def reading(directory: Path, what: str, trust_remote_code: bool) -> Iterator[None]:
    """What transformers says against a directory's tokenizer or config, in our words: UsageError for code that is not
    trusted, which it asks about on a terminal unless it is told True or False; StageError for all else."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # tokenizers raises bare ones, and code of the model's own whatever it likes
        if "trust_remote_code" in str(error):
            raise files.refused_code(directory) from None
        own = files.code(directory) if trust_remote_code else ""
        kind = f"{type(error).__name__} in or around the code that comes with it ({own}): " if own else ""
        raise StageError(f"no usable {what} in {directory}: {kind}{first_line(error)}") from None


def stored_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """transformers' tokenizer of a directory, as it is stored."""
    with reading(directory, "tokenizer", trust_remote_code):
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)


def read_config(model: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a model directory. Raises UsageError for code that is not trusted, StageError for all else."""
    with reading(model, "config", trust_remote_code):
        return AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=trust_remote_code)


class HFTokenizer:
    """Text to ids and back. `hf` is the wrapped tokenizer, for code behind the backend line."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise MissingError(f"{directory} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
        self.hf: Any = stored_tokenizer(directory, trust_remote_code=trust_remote_code)
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
    declared = read_object(path).get("eos_token_id") if path.is_file() else None
    more = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys([own, *more]))
