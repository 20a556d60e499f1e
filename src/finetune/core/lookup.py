"""Names to objects: `"module:attr"` references, entry points of other packages, and "did you mean"."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.core.errors import MissingError, UsageError
from finetune.core.install import missing_package


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def load(reference: str) -> Any:
    """Import `"module:attr"` and return the attribute. Raises MissingError, with the install line, if it needs an extra."""
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or module)) from error


def find(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object that `table` (or an entry point in the group `finetune.<kind>`) has under `name`.

    Raises UsageError with the known names when there is none.
    """
    return load(reference(kind, name, table))


def row(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The row that `table` (or an entry point in the group `finetune.<kind>`) has under `name`. Raises UsageError as `find`."""
    return table[name] if name in table else load(reference(kind, name, dict.fromkeys(table, "")))


def reference(kind: str, name: str, table: Mapping[str, str]) -> str:
    """The `"module:attr"` that `table` (or an entry point in the group `finetune.<kind>`) has under `name`; see `find`."""
    if name in table:
        return table[name]
    from importlib.metadata import entry_points  # a quarter of the start-up time of `finetune --help`

    plugins = {entry.name: entry.value for entry in entry_points(group=f"finetune.{kind}")}
    if name in plugins:
        return plugins[name]
    known = sorted({*table, *plugins})
    raise UsageError(f"unknown {kind} '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
