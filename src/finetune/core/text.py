"""Text of unknown origin (data, models, answers, names), made fit to be shown."""

from __future__ import annotations

import json
import re
from typing import Any

# C0 but for tab and line feed, DEL and C1 (terminals obey both), and what is not seen and moves or hides what is: zero
# width, marks and overrides of the reading direction, other line ends, halves of surrogate pairs, formats of shorthand
# and of music, tags.
HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
_HIDDEN = re.compile(f"[{HIDDEN}]")
_OUTSIDE_ASCII = re.compile(r"[^\x00-\x7e]")


def visible(text: str) -> str:
    r"""`text` with every character that a reader would not see, or a terminal would obey, as its escape (`\x1b`, `\u202e`).

    Tabs and line feeds stay. Doing it twice changes nothing.
    """
    return _HIDDEN.sub(lambda match: _escape(match.group()), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_text(value: Any, *, ascii_only: bool = False, **options: Any) -> str:
    """JSON in which what `visible` escapes is escaped as JSON does it; with `ascii_only` everything outside ASCII.

    `options` are those of `json.dumps`. Such characters stand inside strings only, so the JSON stays what it was.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    hidden = _OUTSIDE_ASCII if ascii_only else _HIDDEN
    return hidden.sub(lambda match: json.dumps(match.group())[1:-1], text)
