"""What a tokenizer has to do, whichever runtime it is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no special tokens but knows them in the text."""

    eos_token: str
    bos_token: str | None
    eos_ids: tuple[int, ...]  # every id that ends a turn
    chat_template: str | None
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...
