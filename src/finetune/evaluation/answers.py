"""When an answer counts as right."""

from __future__ import annotations

import re
import unicodedata


def normalize(text: str) -> str:
    """Case folded, accents composed, punctuation (also `*` and `=`) turned into single spaces; decimal points and
    signs stay."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"(?<!\d)[.,](?!\d)|(?<=\d)[.,](?!\d)|(?<!\d)[.,](?=\d)", " ", folded)
    return " ".join(re.sub(r"[^\w.,+\-/%€$£]+", " ", folded).split())


def is_correct(text: str, answer: str, match: str | None = None) -> bool:
    """Whether `text` answers rightly: it holds `match` as whole words; without `match` it must equal `answer`.

    Nothing counts as an answer when there is nothing to look for.
    """
    said, wanted = normalize(text), normalize(match if match is not None else answer)
    if not wanted:
        return False
    if match is None:
        return said == wanted
    return f" {wanted} " in f" {said} "
