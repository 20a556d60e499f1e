"""Every key of every evidence file of a run, to be taken away, emptied and changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checks
from finetune.checks import CHECKS
from finetune.core.files import write_json, write_jsonl
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.directory import EVENTS, MANIFEST, VERDICTS
from sabotage.context import as_if_written_so

Place = tuple[str | int, ...]
OPAQUE = ("made_with", "options", "settings")  # conditions that are told as a whole
MANY = 6  # a mapping with more keys than this, or with numbers for keys, is a table: its first row stands for all


@dataclass(frozen=True)
class Key:
    """One key in one file. `place` leads to it, from the file's value (of a JSONL file: a list); `name` is the same for all
    keys that mean the same, as `phases.*.correct`."""

    file: str
    place: Place
    name: str

    def __str__(self) -> str:
        return f"{self.file} {self.name}"


def files(run: Run) -> list[str]:
    """The evidence files of a run that hold records; what it says of itself as a whole is the seal's."""
    rows = [file.path for file in layout.FILES if isinstance(file, layout.Document | layout.Rows)]
    compared = [path.relative_to(run.path).as_posix() for path in sorted((run.path / "compare").glob("*.json"))]
    every = dict.fromkeys([EVENTS, *rows, *compared])
    return [name for name in every if name not in (MANIFEST, VERDICTS) and (run.path / name).is_file()]


def load(run: Run, name: str) -> Any:
    text = (run.path / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]] if name.endswith(".jsonl") else json.loads(text)


def store(run: Run, name: str, value: Any) -> None:
    (write_jsonl if name.endswith(".jsonl") else write_json)(run.path / name, value)


def keys(run: Run, name: str) -> list[Key]:
    """Every key of a file, each kind once."""
    found: dict[str, Key] = {}
    value = load(run, name)
    rows = enumerate(value) if name == EVENTS else [(None, value)]
    for number, each in rows:
        before: Place = () if number is None else (number,)
        kind = "" if number is None else f"{each['event']}[{each.get('stage', '')}]."
        for place, label in _below(each):
            key = Key(name, (*before, *place), f"{kind}{label}")
            if name == EVENTS and label == "prev":
                continue  # the chain is made again after every edit; `test_log` breaks it
            found.setdefault(key.name, key)
    return list(found.values())


def _below(value: Any, place: Place = (), label: str = "") -> Iterator[tuple[Place, str]]:
    if isinstance(value, dict):
        table = (
            len(value) > MANY
            and len({_shape(each) for each in value.values()}) == 1
            and _shape(next(iter(value.values())))
        )
        for number, (key, inner) in enumerate(value.items()):
            if (table or re.fullmatch(r"\d+", key)) and number:
                break
            named = "*" if table or re.fullmatch(r"\d+", key) else key
            here = f"{label}.{named}".lstrip(".")
            yield (*place, key), here
            if here in OPAQUE:
                continue
            yield from _below(inner, (*place, key), here)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        yield from _below(value[0], (*place, 0), f"{label}[]")


def _shape(value: Any) -> str:
    """The keys of a mapping, as text; nothing of anything else."""
    return ",".join(sorted(value)) if isinstance(value, dict) else ""


# -- what is done to a key -----------------------------------------------------------------------------------------------


def deleted(parent: Any, key: str | int) -> None:
    del parent[key]


def emptied(parent: Any, key: str | int) -> None:
    value = parent[key]
    parent[key] = type(value)() if isinstance(value, str | list | dict) else None


def changed(parent: Any, key: str | int) -> None:
    parent[key] = _other(parent[key])


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value + 1
    if isinstance(value, float):
        return value * 1.5 + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return value[:-1] if value else ["x"]
    if isinstance(value, dict):
        return dict(list(value.items())[:-1]) if value else {"x": 1}
    return 1


EDITS: dict[str, Callable[[Any, str | int], None]] = {"deleted": deleted, "emptied": emptied, "changed": changed}


def edit(value: Any, key: Key, how: str) -> Any:
    """A copy of a file's value, edited; None where that leaves it as it was."""
    copy = deepcopy(value)
    parent = copy
    for part in key.place[:-1]:
        parent = parent[part]
    EDITS[how](parent, key.place[-1])
    return None if copy == value else copy


def resealed(run: Run, *stages: str) -> None:
    """Have the edit be what was written at the time; an edit that leaves no log to mend stays as it is."""
    try:
        as_if_written_so(run, *stages)
    except (KeyError, TypeError, ValueError, AttributeError):
        return


# -- who looks at a file -------------------------------------------------------------------------------------------------


def readers(recipe: Recipe, run: Run) -> dict[str, list[str]]:
    """The checks that open each file, watched while they look at a sound run; all open files through one door."""
    import pytest

    opened: set[str] = set()
    seen: dict[str, list[str]] = {}

    def watched(path: Path, file: Any) -> bytes:
        opened.add(path.relative_to(run.path).as_posix())
        return path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_bytes", watched)
        real = Run.log

        def log(self: Run) -> Any:
            opened.add(EVENTS)
            return real(self)

        patch.setattr(Run, "log", log)
        for check in CHECKS:
            if check.wanted(recipe):
                opened.clear()
                checks.results(recipe, run, [check.name])
                for name in opened:
                    seen.setdefault(name, []).append(check.name)
    return seen
