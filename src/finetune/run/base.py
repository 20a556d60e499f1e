"""The model that a run stands on, which lies outside of it, held against what `fetch` wrote down."""

from __future__ import annotations

from pathlib import Path

from finetune.core.files import digest
from finetune.run import evidence
from finetune.run.directory import Run
from finetune.run.seal import Found


def base_changed(run: Run, place: Path | None = None) -> list[Found]:
    """The files of base and adapter (of one of them, with its directory `place`) that are gone or others than fetched.

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
    return found
