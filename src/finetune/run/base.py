"""The model that a run stands on, which lies outside of it, held against what `fetch` wrote down."""

from __future__ import annotations

from pathlib import Path

from finetune.core.files import digest
from finetune.run import evidence
from finetune.run.directory import Run
from finetune.run.seal import Found

_NOTES = (".md", ".gitattributes", ".png", ".jpg")


def base_changed(run: Run, place: Path | None = None) -> list[Found]:
    """The files of base and adapter (of one of them, with its directory `place`) that are gone, new, or others than fetched.

    Raises EvidenceError where `fetch/model.json` cannot be read.
    """
    fetched = evidence.fetched(run)
    found = []
    for where, files in ((fetched["base"], fetched["files"]), (fetched["adapter"], fetched["adapter_files"])):
        if where is None or place not in (None, Path(where)):
            continue
        for name, facts in files.items():
            file = Path(where) / name
            if not file.is_file():
                found.append(Found(file=str(file), why="is gone"))
            elif digest(file) != facts["sha256"]:
                found.append(Found(file=str(file), why="was changed after it was fetched"))
        there = files_of(Path(where)) if Path(where).is_dir() else []
        found += [
            Found(file=str(file), why="was not there when it was fetched") for file in there if file.name not in files
        ]
    return found


def files_of(directory: Path) -> list[Path]:
    """The files of a model's directory that count; those that only tell of it do not."""
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOTES)
    ]
