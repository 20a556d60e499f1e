"""What makes much of little in a template: operators, methods, functions and filters whose result may be far larger than
what they are given, each with how large. The others make at most a few times as much, and that is paid for when it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.data.budget import DIGITS_BITS, LARGEST, TooMuch, check, weight

# Filters that look at a list or hand it on, and make no text of it: what it weighs is not asked each time.
LAZY = frozenset(
    (
        "length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr", "items",
        "dictsort", "sort", "groupby", "unique", "min", "max", "random", "reverse", "default", "d", "attr", "batch",
        "slice", "sum", "join",
    )
)  # fmt: skip
_ENTRIES = 100_000  # as many as jinja2's sandbox allows in a range
_SLOW = 100_000  # characters for filters that search with regular expressions, or copy the text once a match
_SMALL = 1_000  # for what is written again and again around something else
_NUMBER = re.compile(r"\d+")
_PLACES = {  # where a format shows an argument, with its widths
    "%": re.compile(r"%(?:\([^)]*\))?[-+ #0-9.*]*"),
    "{": re.compile(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"),
}
Arguments = Sequence[Any]
Named = Mapping[str, Any]
# What a call is given, and what it is to be given instead: lists in place of what can be read only once.
Check = Callable[[str, Arguments, Named], Arguments | None]


def operator(sign: str, left: Any, right: Any) -> None:
    """Raise TooMuch where `left sign right` would be too large."""
    for text, times in ((left, right), (right, left)):
        if sign == "*" and isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
            check(len(text) * max(times, 0), f"a value of {len(text):,} entries or characters, {times:,} times,")
    if sign in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if sign == "*" else _power_bits(left, right)
        if bits > DIGITS_BITS:
            raise TooMuch(f"{sign} makes a whole number of more than {DIGITS_BITS:,} bits")
    if sign == "%" and isinstance(left, str | bytes):
        given = right if isinstance(right, tuple) else (right,)
        _formatted("%", left, given)


def _power_bits(base: int, exponent: int) -> int:
    return base.bit_length() * max(exponent, 0) if abs(base) > 1 else 1


def call(function: Any, arguments: Arguments, named: Named) -> Arguments:
    """The arguments with which to call a method or a global function. Raises TooMuch."""
    name = getattr(function, "__name__", "")
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    found: Check | None = None
    if isinstance(owner, str | bytes | int):
        found = _METHODS.get(name)
        arguments = (owner, *arguments)
    elif name in _FUNCTIONS:
        return _checked(_FUNCTIONS[name], name, arguments, named)
    if found is None:
        return arguments[1:] if isinstance(owner, str | bytes | int) else arguments
    return _checked(found, f"{name}()", arguments, named)[1:]


def filtered(name: str, arguments: Arguments, named: Named) -> Arguments:
    """The arguments (the value first) with which to call a filter. Raises TooMuch."""
    if name not in LAZY:
        check(weight(arguments[0]), f"what is given to the filter '{name}'")
    found = _FILTERS.get(name)
    return _checked(found, f"the filter '{name}'", arguments, named) if found else arguments


def _checked(found: Check, what: str, arguments: Arguments, named: Named) -> Arguments:
    other = found(what, arguments, named)
    return arguments if other is None else other


def _get(arguments: Arguments, named: Named, index: int, name: str, default: Any) -> Any:
    return arguments[index] if len(arguments) > index else named.get(name, default)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _width(what: str, arguments: Arguments, named: Named) -> None:
    check(max((_number(each) for each in (*arguments[1:], *named.values())), default=0), what)


def _tabs(what: str, arguments: Arguments, named: Named) -> None:
    text, size = arguments[0], _number(_get(arguments, named, 1, "tabsize", 8))
    check(len(text) + text.count(b"\t" if isinstance(text, bytes) else "\t") * size, what)


def _replace(what: str, arguments: Arguments, named: Named) -> None:
    old, new = _get(arguments, named, 1, "old", ""), _get(arguments, named, 2, "new", "")
    text = arguments[0] if isinstance(arguments[0], bytes) else str(arguments[0])
    if isinstance(text, bytes) and isinstance(old, bytes):
        check(len(text) + text.count(old) * weight(new), what)
    elif isinstance(text, str) and not isinstance(old, bytes):
        check(len(text) + text.count(str(old)) * weight(new), what)


def _join(what: str, arguments: Arguments, named: Named) -> Arguments:
    """`separator.join(parts)`: the separator is the method's own."""
    separator, *rest = arguments
    if not rest:
        return arguments
    return (separator, _parts(what, rest[0], len(separator)), *rest[1:])


def _join_filter(what: str, arguments: Arguments, named: Named) -> Arguments:
    between = _get(arguments, named, 1, "d", "")
    return (_parts(what, arguments[0], weight(between)), *arguments[1:])


def _parts(what: str, parts: Any, between: int) -> Any:
    try:
        listed = parts if isinstance(parts, str | dict) else list(parts)
    except TypeError:  # nothing to be joined, which the call itself tells
        return parts
    check(weight(listed) + len(listed) * between, what)
    return listed


def _format(what: str, arguments: Arguments, named: Named) -> None:
    _formatted("{", arguments[0], (*arguments[1:], *named.values()))


def _format_filter(what: str, arguments: Arguments, named: Named) -> None:
    _formatted("%", arguments[0], (*arguments[1:], *named.values()))


def _formatted(mark: str, form: Any, given: Arguments) -> None:
    """A format with widths (`%9d`, `{:>9}`), also given as arguments, and with what it shows, once a place."""
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    places = _PLACES[mark].findall(text)
    widths = sum(min(int(number[:9]), LARGEST + 1) for place in places for number in _NUMBER.findall(place))
    if any("*" in place or place.count("{") > 1 for place in places):  # then the arguments are widths too
        widths += len(places) * sum(min(max(each, 0), LARGEST + 1) for each in given if isinstance(each, int))
    shown = max((weight(each) for each in given), default=0)
    check(len(text) + widths + len(places) * shown, "a format")


def _translate(what: str, arguments: Arguments, named: Named) -> None:
    table = _get(arguments, named, 1, "table", {})
    largest = max((weight(each) for each in table.values()), default=1) if isinstance(table, dict) else 1
    check(len(arguments[0]) * largest, what)


def _entries(what: str, arguments: Arguments, named: Named) -> None:
    for each in (*arguments[1:], *named.values()):
        if isinstance(each, int) and each > _ENTRIES:
            raise TooMuch(f"{what} makes more than {_ENTRIES:,} entries")


def _indent(what: str, arguments: Arguments, named: Named) -> None:
    text, width = str(arguments[0]), _get(arguments, named, 1, "width", 4)
    each = len(width) if isinstance(width, str) else _number(width)
    check(len(text) + (text.count("\n") + 1) * each, what)


def _round(what: str, arguments: Arguments, named: Named) -> None:
    if abs(_number(_get(arguments, named, 1, "precision", 0))) > _SMALL:
        raise TooMuch(f"{what} is given a precision of more than {_SMALL:,} digits")


def _sum(what: str, arguments: Arguments, named: Named) -> None:
    if not isinstance(_get(arguments, named, 2, "start", 0), int | float):
        raise TooMuch(f"{what} adds up what are no numbers, copying it each time")


def _small(what: str, arguments: Arguments, named: Named) -> None:
    for each in (*arguments[1:], *named.values()):
        if isinstance(each, str | int) and (_number(each) if isinstance(each, int) else len(each)) > _SMALL:
            raise TooMuch(f"{what} is given a number or a text larger than {_SMALL:,}")


def _slow(what: str, arguments: Arguments, named: Named) -> None:
    _small(what, arguments, named)
    if weight(arguments[0]) > _SLOW:
        raise TooMuch(f"{what} is given more than {_SLOW:,} characters")


def _every_small(what: str, arguments: Arguments, named: Named) -> None:
    _small(what, (None, *arguments), named)


def _lorem(what: str, arguments: Arguments, named: Named) -> None:
    if any(isinstance(each, int) and each > 100 for each in (*arguments, *named.values())):
        raise TooMuch("lipsum() is asked for more than 100 paragraphs or words")


_METHODS: dict[str, Check] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _width),
    "expandtabs": _tabs,
    "replace": _replace,
    "join": _join,
    "format": _format,
    "format_map": _format,
    "translate": _translate,
}
_FUNCTIONS: dict[str, Check] = {
    "generate_lorem_ipsum": _lorem,
    "strftime_now": _every_small,
    "_strftime_now": _every_small,
}
_FILTERS: dict[str, Check] = {
    "center": _width,
    "indent": _indent,
    "replace": _replace,
    "join": _join_filter,
    "format": _format_filter,
    "batch": _entries,
    "slice": _entries,
    "round": _round,
    "sum": _sum,
    "tojson": _small,
    **dict.fromkeys(("wordwrap", "urlize", "striptags", "pprint", "xmlattr", "truncate"), _slow),
}
