"""What is wrong with a YAML file, as pydantic found it, told with file, line and the nearest known key."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.core.lookup import did_you_mean
from finetune.core.secrets import redact

# The line of every path in the file; for a path given on the command line, the option instead.
Lines = dict[tuple[str | int, ...], int | str]
TOKEN_PATH = ("model", "token")
LISTED = 100  # faults; a reader mends no more at once, and each costs a search for the nearest key


def place(source: str, path: tuple[str | int, ...], lines: Lines) -> str:
    known = path
    while known and known not in lines:
        known = known[:-1]
    line = lines.get(known)
    where = line if isinstance(line, str) else f"{source}:{line}" if line is not None else source
    return f"{where}: {'.'.join(str(part) for part in path)}" if path else where


def describe(error: ValidationError, source: str, lines: Lines, root: type[BaseModel]) -> list[str]:
    """One line for every path at fault, up to `LISTED`; the alternatives of a key that takes several types are joined."""
    found: dict[tuple[str | int, ...], list[str]] = {}
    every = error.errors(include_url=False)
    for count, fault in enumerate(every):
        path = _real_path(fault["loc"], root)
        if path not in found and len(found) == LISTED:
            found[()] = [f"and {len(every) - count} more faults like these"]
            break
        messages = found.setdefault(path, [])
        if (message := _message(fault, path, root)) not in messages:
            messages.append(message)
    # A list that is wrong inside is also no string, where either was allowed; only the inside is worth telling.
    outer = {path[:length] for path in found for length in range(1, len(path))}
    return [
        redact(f"{place(source, path, lines)}: {'; or: '.join(said)}")
        for path, said in found.items()
        if path not in outer
    ]


def _message(fault: Any, path: tuple[str | int, ...], root: type[BaseModel]) -> str:
    if fault["type"] == "extra_forbidden":
        section = section_at(path[:-1], root)
        known = list(section.model_fields) if section else []
        hint = did_you_mean(str(path[-1]), known) or f" Known: {', '.join(known)}."
        return f"unknown key.{hint}"
    if fault["type"] == "missing":
        return "required, but missing"
    message, value = str(fault["msg"]).removeprefix("Value error, "), fault["input"]
    if path == TOKEN_PATH or isinstance(value, (dict, list)) or value is None:
        return message
    hint = did_you_mean(value, re.findall(r"'([^']*)'", message)) if isinstance(value, str) else ""
    return f"{message}, not {value!r}.{hint}" if hint else f"{message}, not {value!r}"


def _real_path(location: tuple[str | int, ...], root: type[BaseModel]) -> tuple[str | int, ...]:
    """A fault's path in the file: without the names that pydantic gives to the alternatives of a type."""
    here: type[BaseModel] | None = root
    for index, part in enumerate(location):
        if here is None or part not in here.model_fields:
            return location[: index + 1]
        field = here.model_fields[str(part)].annotation
        here = _model_class(field)
        if here is None:
            rest = location[index + 1 :]
            inside = tuple(item for item in rest if isinstance(item, int) or getattr(field, "__origin__", None) is dict)
            return (*location[: index + 1], *inside)
    return location


def section_at(path: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section class at a path, found through the annotations."""
    here: type[BaseModel] | None = root
    for part in path:
        if here is None or part not in here.model_fields:
            return None
        here = _model_class(here.model_fields[str(part)].annotation)
    return here


def _model_class(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
