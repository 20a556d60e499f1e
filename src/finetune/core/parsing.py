"""JSON that others wrote: nested without end, with numbers that nothing holds, with keys twice."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

DEPTH = 100
DIGITS = 40  # of a whole number: 128 bits have 39
_ENDLESS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Odd:
    """Stands in a value for what cannot be one; `why` is a phrase."""

    def __init__(self, why: str) -> None:
        self.why = why


def _whole(text: str) -> int | Odd:
    return int(text) if len(text) <= DIGITS else Odd(f"a whole number of {len(text):,} digits is too large")


def _number(text: str) -> float | Odd:
    found = float(text)
    return found if math.isfinite(found) else Odd(f"the number {_short(text)} is too large")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Odd:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen = set[str]()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return Odd(f"the key '{_short(twice)}' is there twice")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


# Reads what `json.loads` does, with an `Odd` where a value is none; `odd` finds it, and its place is then known.
DECODER = json.JSONDecoder(parse_int=_whole, parse_float=_number, object_pairs_hook=_object)


def loads(text: str | bytes) -> Any:
    """As `json.loads`, for a file that a program wrote. Raises ValueError also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def odd(value: Any) -> str | None:
    """What is wrong inside a value of `DECODER` (or of any other source of rows), the first thing; None for nothing."""
    level = [value]
    for _ in range(DEPTH):
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, Odd):
                return each.why
            if isinstance(each, str):
                if problem := _text_problem(each):
                    return problem
            elif isinstance(each, dict):
                deeper += each.keys()
                deeper += each.values()
            elif isinstance(each, list | tuple):
                deeper += each
        if not deeper:
            return None
        level = deeper
    return f"nested more than {DEPTH} deep"


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "a NUL byte (\\u0000) is no text"
    if not text.isascii() and _SURROGATE.search(text):
        return "half of a surrogate pair (\\ud800 to \\udfff) is not valid Unicode"
    return None


def too_deep(text: str) -> int | None:
    """Where in a JSON text its nesting goes too deep (an offset); None where it does not."""
    return next((at for at, depth in _depths(text) if depth > DEPTH), None)


def _depths(text: str) -> Iterator[tuple[int, int]]:
    depth = 0
    for found in _ENDLESS.finditer(text):
        sign = found.group()[0]
        if sign != '"':
            depth += 1 if sign in "[{" else -1
            yield found.start(), depth
