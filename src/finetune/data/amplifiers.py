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
# Where filters are given the name of an attribute, the value being 0.
_ATTRIBUTES = {
    "groupby": 1, "sum": 1, "selectattr": 1, "rejectattr": 1, "min": 2, "max": 2, "unique": 2, "join": 2, "sort": 3,
}  # fmt: skip
_ENTRIES = 100_000  # as many as jinja2's sandbox allows in a range
_SLOW = 100_000  # characters for filters that search with regular expressions, or copy the text once a match
_SMALL = 1_000  # for what is written again and again around something else
_SEARCH = 100_000_000  # characters compared, where a search is as slow as the text is long times what is looked for
_NAMED = 100  # characters of an attribute, whose every part is taken of every entry
_LONGEST = 100  # characters that an encoding may write for one that it has not
_DIRECT = frozenset(("utf8", "ascii", "latin1", "utf16", "utf32"))  # encodings of time in proportion to the text
_NUMBER = re.compile(r"\d+")
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
        _formatted(left, right if isinstance(right, tuple) else (right,))


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
    attribute = _get(arguments, named, _ATTRIBUTES.get(name, len(arguments)), "attribute", None)
    if isinstance(attribute, str) and len(attribute) > _NAMED:
        raise TooMuch(f"the filter '{name}' is given an attribute of more than {_NAMED} characters")
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


def _format_filter(what: str, arguments: Arguments, named: Named) -> None:
    _formatted(arguments[0], (*arguments[1:], *named.values()))


def field(spec: str) -> None:
    """Raise TooMuch where a field of `str.format`, of which `spec` stands after the colon, would be too wide."""
    check(_widths(spec), "a format")


def _widths(form: str) -> int:
    # More than nine digits may be zeros, and are no width that anyone writes.
    return sum(int(number) if len(number) <= 9 else LARGEST + 1 for number in _NUMBER.findall(form))


def _formatted(form: Any, given: Arguments) -> None:
    """A format with widths (`%9d`), also given as arguments (`%*d`), and with what it shows, once a place."""
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    after = text.partition("%")[2]
    places = text.count("%")
    widths = _widths(after)
    if "*" in after:
        widths += places * sum(min(max(each, 0), LARGEST + 1) for each in given if isinstance(each, int))
    shown = max((weight(each) for each in given), default=0)
    check(len(text) + widths + places * shown, "a format")


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
    check(len(text) + (len(text.splitlines()) + 1) * each, what)  # they end at more than line feeds


def _round(what: str, arguments: Arguments, named: Named) -> None:
    if abs(_number(_get(arguments, named, 1, "precision", 0))) > _SMALL:
        raise TooMuch(f"{what} is given a precision of more than {_SMALL:,} digits")


def _sum(what: str, arguments: Arguments, named: Named) -> None:
    if not isinstance(_get(arguments, named, 2, "start", 0), int | float):
        raise TooMuch(f"{what} adds up what are no numbers, copying it each time")


def _small(what: str, arguments: Arguments, named: Named) -> None:
    for each in (*arguments[1:], *named.values()):
        if (each if isinstance(each, int) else weight(each)) > _SMALL:
            raise TooMuch(f"{what} is given a number, a text or a list larger than {_SMALL:,}")


def _tojson(what: str, arguments: Arguments, named: Named) -> None:
    """An indent is written once for each level around an entry, a separator once an entry."""
    _small(what, arguments, named)
    given = (*arguments[1:], *named.values())
    each = sum(each if isinstance(each, int) else weight(each) for each in given if each is not None)
    check(each * _levels(arguments[0]), what)


def _levels(value: Any) -> int:
    """How many lists and mappings are around each entry, together."""
    total, waiting = 0, [(value, 1)]
    while waiting:
        each, depth = waiting.pop()
        total += depth
        inside = each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else ()
        waiting += [(one, depth + 1) for one in inside]
    return total


def _slow(what: str, arguments: Arguments, named: Named) -> None:
    _small(what, arguments, named)
    if weight(arguments[0]) > _SLOW:
        raise TooMuch(f"{what} is given more than {_SLOW:,} characters")


def _every_small(what: str, arguments: Arguments, named: Named) -> None:
    _small(what, (None, *arguments), named)


def _searched(what: str, arguments: Arguments, named: Named) -> None:
    """Searches from the right, and for any of many characters at the ends, look at each once for each."""
    wanted = max((weight(each) for each in (*arguments[1:], *named.values())), default=1)
    if len(str(arguments[0])) * wanted > _SEARCH:
        raise TooMuch(f"{what} looks for a long text in a long text")


def _encoded(what: str, arguments: Arguments, named: Named) -> None:
    encoding = str(_get(arguments, named, 1, "encoding", "utf-8"))
    if re.sub("[-_ ]", "", encoding.lower()) not in _DIRECT and len(arguments[0]) > _SMALL:
        raise TooMuch(f"{what} is given more than {_SMALL:,} characters for such an encoding")
    if _get(arguments, named, 2, "errors", "strict") != "strict":
        check(len(arguments[0]) * _LONGEST, what)


def _lorem(what: str, arguments: Arguments, named: Named) -> None:
    if any(isinstance(each, int) and each > 100 for each in (*arguments, *named.values())):
        raise TooMuch("lipsum() is asked for more than 100 paragraphs or words")


_METHODS: dict[str, Check] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _width),
    "expandtabs": _tabs,
    "replace": _replace,
    "join": _join,
    "translate": _translate,
    "striptags": _slow,
    **dict.fromkeys(("encode", "decode"), _encoded),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"), _searched),
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
    "tojson": _tojson,
    "trim": _searched,
    **dict.fromkeys(("wordwrap", "urlize", "striptags", "pprint", "xmlattr", "truncate"), _slow),
}
