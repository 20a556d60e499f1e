"""Secrets stay out of everything that is written, and what is not secret stays as it is.

What is secret:

- the value of an environment variable with a secret's name (`names`), and the password in the address of any variable;
- the recipe's `model.token`, which is `remember`ed;
- whatever has the shape of a known kind of token, or is the password in an address (`shapes`).

What is done with it depends on the text that it stands in:

- A line for people (notes, errors, a child's last words) goes through `redact`, which puts `***` in its place.
- A document (events, reports, the manifest) goes through `redacted`, text by text.
- Data (rows, prompts, answers, templates, paths) are written as they are, never changed. Where they come in, `detector`
  looks through them, and a secret in them is refused by the name of its variable, with file and line.

A value that looks like other text is no secret that could be told from it: under 8 characters, one plain word, a few
words of under 16 characters, a short number, fewer than 5 different characters (`values.looks_secret`). Such a value is
hidden in lines for people alone, from 6 characters on and where it stands as a word of its own; documents and data keep it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from finetune.core.secrets import shapes
from finetune.core.secrets.names import is_secret_name
from finetune.core.secrets.values import forms, looks_secret, parts

__all__ = ["detector", "holds_secret", "is_secret_name", "looks_secret", "redact", "redacted", "remember"]

HIDDEN = "***"
TOKEN = "model.token"  # what a remembered value is called
_WORD = 6  # characters from which on a value that looks like a word is hidden in lines for people

_known: set[str] = set()

T = TypeVar("T")


def remember(value: str) -> None:
    """From now on this value, the recipe's token, is a secret, whatever variable it may have come from."""
    if value:
        _known.add(value)


def holds_secret(variable: str) -> bool:
    """Whether an environment variable holds a secret, by its name or by the shape of its value."""
    return is_secret_name(variable) or shapes.find(os.environ.get(variable, "")) is not None


def redact(text: str) -> str:
    """A line for people with every secret in it replaced by `***`."""
    words = []
    for value, _ in _values():
        if looks_secret(value):
            text = _without(text, value)
        elif len(value) >= _WORD:
            words.append(value)
    text = shapes.hide(text, HIDDEN)
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", HIDDEN, text)
    return text


def redacted(document: T) -> T:
    """A document of dictionaries, lists and plain values, with every secret in its texts replaced by `***`.

    Keys stay, and so do values that look like words: both are what programs know the document by.
    """
    values = [value for value, _ in _values() if looks_secret(value)]

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        if not isinstance(value, str):
            return value
        for secret in values:
            value = _without(value, secret)
        return shapes.hide(value, HIDDEN)

    cleaned: T = clean(document)
    return cleaned


def detector() -> Callable[[str], str | None]:
    """A function that names the secret which a text holds ("the value of HF_TOKEN"), or None.

    It knows the secrets of the moment when it was made, so that a long file can be looked through at once.
    """
    known = [(form, what) for value, what in _values() if looks_secret(value) for form in forms(value)]

    def found(text: str) -> str | None:
        for form, what in known:
            if form in text:
                return what
        return shapes.find(text)

    return found


def _without(text: str, value: str) -> str:
    for form in forms(value):
        text = text.replace(form, HIDDEN)
    return text


def _values() -> list[tuple[str, str]]:
    """(value, what it is) of every secret that is known now, the longest first: one may be a part of another."""
    found: dict[str, str] = {}
    for variable, whole in os.environ.items():
        for value in parts(variable, whole):
            found.setdefault(value, f"the value of {variable}" if value == whole else f"a secret in {variable}")
    for value in _known:
        found.setdefault(value, f"the value of {TOKEN}")
    return sorted(found.items(), key=lambda each: len(each[0]), reverse=True)
