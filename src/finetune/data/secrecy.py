"""Data that hold a secret are refused where they come in: what is trained on is stored, and a model may say it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError
from finetune.core.secrets import detector
from finetune.data.faults import plural, raise_all
from finetune.data.sources import Row
from finetune.recipe import Recipe

_WAYS = (
    "Take them out of the data. Where they are no secrets, set data.on_secret to keep, or unset the variable "
    "(env -u NAME finetune ...)"
)


def refuse(rows: Iterable[Row]) -> None:
    """Raise DataError naming file, line and variable of every row that holds a secret."""
    found = detector()
    faults = [
        f"{row.file}:{row.line}: holds {what}"
        for row in rows
        if (what := next((what for text in texts(row.values) if (what := found(text))), None))
    ]
    raise_all(f"the data hold secrets ({plural(len(faults), 'row')}). {_WAYS}:", faults)


def refuse_text(text: str, name: str) -> None:
    """Raise UsageError for a secret in a file that goes into a run to the letter: a template, a licence, a config."""
    if what := detector()(text):
        number = next((n for n, line in enumerate(text.split("\n"), 1) if detector()(line)), 1)
        raise UsageError(f"{name}:{number}: holds {what}, and would be stored in the run; take it out")


def refuse_path(path: Path, what: str) -> None:
    """Raise UsageError for a path that holds a secret: many files of a run name it."""
    if found := detector()(str(path)):
        raise UsageError(f"the path of {what} holds {found}, and the run would name it in its files. Move it elsewhere")


def allowed(recipe: Recipe) -> bool:
    """Whether the recipe says that its data and questions may hold what looks like secrets."""
    named = (recipe.data, recipe.align.data if recipe.align else None)
    return any(data is not None and data.on_secret == "keep" for data in named)


def texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)
