"""The model that a run stands on, which lies outside of it, held against what `fetch` wrote down."""

from __future__ import annotations

from pathlib import Path

from finetune.core.files import digest
from finetune.run import evidence
from finetune.run.directory import Run
from finetune.run.layout import MODEL
from finetune.run.seal import Found

_NOTES = (".md", ".gitattributes", ".png", ".jpg")


def base_changed(run: Run, place: Path | None = None) -> list[Found]:
    """The files of base and adapter (of one of them, with its directory `place`) that are gone, new, or others than fetched.

    Raises EvidenceError where `fetch/model.json` cannot be read.
    """
    fetched = evidence.maybe(run, MODEL)
    if fetched is None:  # nobody knows what was fetched
        return []
    listed = {path: sha256 for path, sha256 in fetched.get("converted_from", {}).items() if place is None}
    new: list[Found] = []
    for where, files in ((fetched["base"], fetched["files"]), (fetched["adapter"], fetched["adapter_files"])):
        if where is None or place not in (None, Path(where)):
            continue
        listed |= {str(Path(where) / name): facts["sha256"] for name, facts in files.items()}
        there = files_of(Path(where)) if Path(where).is_dir() else []
        new += [
            Found(file=str(file), why="was not there when it was fetched") for file in there if file.name not in files
        ]
    found = []
    for path, sha256 in listed.items():
        if not Path(path).is_file():
            found.append(Found(file=path, why="is gone"))
        elif digest(Path(path)) != sha256:
            found.append(Found(file=path, why="was changed after it was fetched"))
    return [*found, *new]


def files_of(directory: Path) -> list[Path]:
    """The files of a model's directory that count; those that only tell of it do not."""
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOTES)
    ]
