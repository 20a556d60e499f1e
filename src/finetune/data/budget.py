"""What rendering one conversation may cost, and how much a value weighs."""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, ValuesView
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

# A conversation of 60 turns and 100 kB takes 1,000 steps and 1 MB; a million tokens are some 4 MB.
LARGEST = 8_000_000  # of one value: characters, plus ENTRY for each entry of a list or mapping, however often it is met
ENTRY = 40
MADE = 128_000_000  # of all values made while rendering, together
STEPS = 1_000_000  # rounds of loops, calls, filters, entries looked at
SECONDS = 5.0  # of this thread's own computing: a busy machine refuses no template
DIGITS_BITS = 16_384  # of a whole number
_CLOCK_EVERY = 64  # steps
_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(SecurityError):
    """A template does more than a chat template has to. The text says what it did, and the bound."""


class Budget:
    """What is left of one rendering."""

    def __init__(self, made: int = MADE) -> None:
        self.steps, self.made, self._made = STEPS, made, made
        self.until = time.thread_time() + SECONDS
        self.checked = STEPS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEPS:,} steps (rounds of its loops, calls, filters)")
        if self.checked - self.steps >= _CLOCK_EVERY:
            self.look_at_clock()

    def look_at_clock(self) -> None:
        self.checked = self.steps
        if time.thread_time() > self.until:
            raise TooMuch(f"it computes for more than {SECONDS:g} seconds")

    def make(self, size: int) -> None:
        self.made -= size
        if self.made < 0:
            raise TooMuch(f"it makes more than {self._made:,} characters on its way")


# None where nothing is rendered or compiled: then only the bounds on one value hold.
current: ContextVar[Budget | None] = ContextVar("budget", default=None)


def step(count: int = 1) -> None:
    """Take steps of the rendering that is going on."""
    if budget := current.get():
        budget.step(count)


def check(size: int, what: str) -> int:
    """A size, in characters. Raises TooMuch, saying `what` was to be made, where it is beyond the largest value."""
    if size > LARGEST:
        raise TooMuch(f"{what} makes more than {LARGEST:,} characters")
    return size


def made(value: Any, what: str) -> Any:
    """The value, paid for."""
    size = check(weight(value), what)
    if budget := current.get():
        budget.make(size)
    return value


def weight(value: Any) -> int:
    """What a value comes to where it is written out, counted up to somewhat above the largest that is allowed.

    An entry that is met twice counts twice, as it is written twice: 30 lists, each holding the one before two times, are a
    billion entries.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return _digits(value)
    if not isinstance(value, (dict, Namespace, *_CONTAINERS)):
        return 1
    total, waiting = 0, [value]
    entries = 0
    while waiting and total <= LARGEST:
        each = waiting.pop()
        entries += 1
        total += ENTRY
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, int):
            total += _digits(each)
        elif isinstance(each, Namespace):
            waiting.append(_attributes(each))
        elif isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, _CONTAINERS):
            # An entry costs at least ENTRY: more of them than that allows are too many, whatever they are.
            total += LARGEST if len(each) * ENTRY > LARGEST else 0
            waiting += each
    step(entries)
    return total


def _digits(value: int) -> int:
    if value.bit_length() > DIGITS_BITS:
        raise TooMuch(f"it computes a whole number of more than {DIGITS_BITS:,} bits")
    return value.bit_length() // 3 + 1


def _attributes(space: Namespace) -> Any:
    with suppress(AttributeError):
        return object.__getattribute__(space, "_Namespace__attrs")
    return None
