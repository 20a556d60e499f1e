"""Secrets stay out of everything that is written: recipes, events, reports, logs, errors."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

_TOKEN_LIKE = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{20,})")
# TOKENIZERS_PATH and MAX_TOKENS are no secrets.
_SECRET_NAME = re.compile(r"TOKEN(?!IZ|S(?:_|$))|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_TOKEN")
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
    given = [value for name in _TOKEN_VARIABLES if len(value := os.environ.get(name, "")) >= 6]
    for secret in sorted({form for value in {*_known, *given} for form in _forms(value)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _TOKEN_LIKE.sub("***", text)


def _forms(secret: str) -> set[str]:
    """A secret as it is, and as it looks inside JSON and in an address."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="")}
