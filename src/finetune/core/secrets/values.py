"""Whether a value can be told from other text, and how it may be spelled where it stands."""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

from finetune.core.secrets import shapes
from finetune.core.secrets.names import is_secret_name

_LETTERS = r"[^\W\d_]+"
_WORD = re.compile(_LETTERS)
_WORDS = re.compile(rf"{_LETTERS}(?:[ ,;'’]+{_LETTERS})*[.!?]?")
_NUMBER = re.compile(r"[\d.,:/ +-]+")
SHORTEST = 8
_LONG = 16  # characters of one word, or of several, that no ordinary text has by chance
_LONG_NUMBER = 12
_DIFFERENT = 5


@functools.lru_cache(1024)
def looks_secret(value: str) -> bool:
    """Whether a secret's value can be told from ordinary text, so that where it occurs is no chance.

    Not one of under 8 characters, of fewer than 5 different ones, one plain word (`capital`, `Paris`, `HELLO`) or several
    with spaces (`the capital`) of under 16 characters, or a number, date or time of under 12.
    """
    if shapes.find(value):
        return True
    if len(value) < SHORTEST or len(set(value)) < _DIFFERENT:
        return False
    if len(value) < _LONG and _WORD.fullmatch(value):
        return value not in (value.lower(), value.upper(), value.capitalize())
    if len(value) < _LONG and _WORDS.fullmatch(value):
        return False
    return not (len(value) < _LONG_NUMBER and _NUMBER.fullmatch(value))


@functools.lru_cache(1024)
def forms(secret: str) -> tuple[str, ...]:
    """A secret as it is, and as it looks inside JSON, Python's `repr`, an address and a page; the longest first."""
    percent = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    small = {re.sub(r"%[0-9A-F]{2}", lambda code: code.group().lower(), form) for form in percent}
    found = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        html.escape(secret),
        *percent,
        *small,
    }
    return tuple(sorted(found, key=len, reverse=True))


@functools.lru_cache(4096)
def parts(variable: str, value: str) -> tuple[str, ...]:
    """What of an environment variable is secret: all of it and what is in it, where its name says so; else tokens and
    passwords by their shape. The path of a file that is there is none."""
    found = list(shapes.parts(value))
    if is_secret_name(variable) and value and not _is_place(value):
        lines = [line.strip() for line in value.splitlines()[1:-1]]
        found += [value, *shapes.assigned(value), *(line for line in lines if len(line) >= _LONG), *_in_json(value)]
    return tuple(found)


def _in_json(value: str) -> Iterator[str]:
    if not value.lstrip().startswith("{"):
        return
    try:
        stored = json.loads(value)
    except (ValueError, RecursionError):
        return
    for key, inner in stored.items():
        if isinstance(inner, str) and inner and is_secret_name(key):
            yield inner


def _is_place(value: str) -> bool:
    """Whether a value is the path of something: `NETRC` and `..._CREDENTIALS` name files with secrets."""
    if not (value.startswith("~") or os.path.isabs(value)) or "\n" in value:
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
