"""Ollama's Modelfile, written and read as Ollama reads it (its parser/parser.go).

Its parser drops every character that Go does not call printable (also the joiner inside an emoji and the no-break
space), and ends a `\"""` value at the first line that ends in `\"""`. So what is written here is read back at once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from finetune.core.errors import UsageError

Command = tuple[str, str]
COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
_TEXTS = ("template", "system", "license")
_SPACE, _NEWLINE = " \t", "\r\n"


def printable(text: str) -> str:
    """What Ollama keeps of a text."""
    return "".join(character for character in text if character in "\t\r\n" or _printable(character))


def _printable(character: str) -> bool:
    # Go's strconv.IsPrint: letters, marks, numbers, punctuation, symbols, and the ASCII space.
    return character == " " or unicodedata.category(character)[0] in "LMNPS"


def write(commands: Sequence[Command]) -> str:
    """The Modelfile's text. A name is that of a command (`from`, `template`, ...) or of a parameter (`stop`).

    Raises UsageError for a value that Ollama would read as another.
    """
    for name, value in commands:
        line = _line(name, value)
        try:
            found = parse(line if name == "from" else f"FROM x\n{line}")
        except UsageError:
            found = []
        if found[-1:] != [(name, value)]:
            raise UsageError(_unfit(name, value))
    return "".join(_line(name, value) for name, value in commands)


def _line(name: str, value: str) -> str:
    if name == "from":
        return f"FROM {value}\n"
    if name in _TEXTS:
        return f'{name.upper()} """{value}"""\n'
    plain = value.replace(".", "").lstrip("-").isdigit()
    return f"PARAMETER {name} {value}\n" if plain else f'PARAMETER {name} "{value}"\n'


def _unfit(name: str, value: str) -> str:
    lost = sorted({f"U+{ord(each):04X}" for each in value if each not in printable(each)})
    why = f"its parser drops {', '.join(lost[:5])}" if lost else "its parser would take a part of it for the end"
    return f"Ollama's Modelfile cannot hold this {name}: {why}. Take that out of {value[:60]!r}"


def parse(text: str) -> list[Command]:
    """The commands of a Modelfile, parameters under their own names. Raises UsageError where Ollama would refuse it."""
    commands: list[Command] = []
    state, name, role, buffer = "nil", "", "", ""
    for line, character in _numbered(text.removeprefix("\ufeff")):
        follow, kept = _next(state, character, line)
        if follow != state:
            if state == "name":
                name = buffer.lower()
                if name not in COMMANDS:
                    raise UsageError(
                        f"line {line} of the Modelfile: no command '{buffer}'; known: {', '.join(COMMANDS)}"
                    )
                follow = name if name in ("parameter", "message") else follow
            elif state == "parameter":
                name = buffer
            elif state == "message":
                role = buffer
                if role not in ROLES:
                    raise UsageError(f"line {line} of the Modelfile: no role '{role}'; known: {', '.join(ROLES)}")
            elif state == "value":
                value, whole = _unquote(buffer.strip(_SPACE + _NEWLINE))
                if not whole or character in _SPACE:
                    buffer += character
                    continue
                commands.append((name, f"{role}: {value}" if role else value))
                role = ""
            state, buffer = follow, ""
        if kept and _printable(kept):
            buffer += kept
    value, whole = _unquote(buffer.strip(_SPACE + _NEWLINE))
    if state == "value" and whole:
        commands.append((name, f"{role}: {value}" if role else value))
    elif state not in ("nil", "comment"):
        raise UsageError(f"the Modelfile ends inside {name or buffer!r}")
    if not any(name == "from" for name, _ in commands):
        raise UsageError("the Modelfile has no FROM line")
    return commands


def _numbered(text: str) -> list[tuple[int, str]]:
    number, found = 1, []
    for character in text:
        number += character in _NEWLINE
        found.append((number, character))
    return found


def _next(state: str, character: str, line: int) -> tuple[str, str]:
    """The state after a character, and what of it belongs to the buffer."""
    space, newline = character in _SPACE, character in _NEWLINE
    if state == "nil":
        if character == "#":
            return "comment", ""
        return ("nil", "") if space or newline else ("name", character)
    if state == "comment":
        return ("nil" if newline else "comment"), ""
    if state == "value":
        return ("nil" if space or newline else "value"), character
    if space:
        return "value", ""
    allowed = (character.isalnum() or character == "_") if state == "parameter" else character.isalpha()
    if not (allowed and character.isascii()):
        raise UsageError(f"line {line} of the Modelfile: unexpected {character!r} in a {state}")
    return state, character


def _unquote(text: str) -> tuple[str, bool]:
    """The value without its quotes, and whether it is whole."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            whole = len(text) >= 2 * len(mark) and text.endswith(mark)
            return (text[len(mark) : -len(mark)], True) if whole else ("", False)
    return text, True
