"""Secrets stay out of everything that is written: recipes, events, reports, logs, errors."""

from __future__ import annotations

import os
import re

_TOKEN_LIKE = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{20,})")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_known: set[str] = set()


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return bool(_SECRET_NAME.search(variable))


def remember(value: str) -> None:
    """From now on `redact` hides this value. Values under 6 characters are ignored: hiding them would hide words."""
    if len(value) >= 6:
        _known.add(value)


def redact(text: str) -> str:
    """`text` with every known secret, and whatever looks like a token, replaced by `***`."""
    token = os.environ.get("HF_TOKEN", "")
    for secret in sorted({*_known, *([token] if len(token) >= 6 else [])}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _TOKEN_LIKE.sub("***", text)
