"""Exports copied out of a run: each copy is held against the file that it was made of, and gets its name when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.core.errors import StageError
from finetune.core.files import digest, digests, write_text
from finetune.core.memory import need_disk
from finetune.core.secrets import redacted
from finetune.export import Target, bundle, card
from finetune.run import Run

README = "README.md"


def places(run: Run, wanted: Sequence[Target]) -> list[Path]:
    """The folders of exports inside a run."""
    return [run.path / "export" / target.folder for target in wanted]


def deliver(
    run: Run,
    wanted: Sequence[Target],
    out: Path,
    *,
    verdicts: Sequence[Mapping[str, Any]] | None,
    marks: Sequence[str] = (),
    although: Sequence[str] = (),
) -> list[Path]:
    """Copy exports into `out`: all are there in full, under other names, before the first gets its own.

    A bundle's card gets these verdicts (None: it keeps its own) and marks (`run.outcome.marks`). `although` says what the
    exports are put out in spite of: it goes into the bundle's card and manifest, and into a README.md beside any other.
    Raises ResourceError where there is no room, StageError for a copy that is not like its original.
    """
    out.mkdir(parents=True, exist_ok=True)
    although = [card.without_places(reason, card.known_places(run.path, out)) for reason in although]
    sources = {place.name: place for place in places(run, wanted)}
    needed = sum(file.stat().st_size for source in sources.values() for file in source.rglob("*") if file.is_file())
    need_disk(out, needed, "the copy of the exports", "name another --out DIR")
    partials = {folder: out / f".{folder}.{os.getpid()}.partial" for folder in sources}
    try:
        for folder, source in sources.items():
            _copy(source, partials[folder])
            if folder == "bundle" and (verdicts is not None or although):
                bundle.set_card(partials[folder], verdicts, marks, although)
            elif although:
                write_text(partials[folder] / README, redacted(card.with_warning(f"# {folder}", although)))
        for folder, partial in partials.items():
            _put(partial, out / folder)
    finally:
        for partial in partials.values():
            shutil.rmtree(partial, ignore_errors=True)
    return [out / folder for folder in sources]


def _copy(source: Path, target: Path) -> None:
    """Copy a folder. The originals' digests are those that were held against the run's lists just now."""
    expected = digests(source)
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for name, sha in expected.items():
        if not (target / name).is_file() or digest(target / name) != sha:
            raise StageError(f"the copy of {source / name} is not like it; is the disk of {target.parent} sound?")


def _put(partial: Path, place: Path) -> None:
    """Rename a finished directory into its place; what was there goes only when that has worked."""
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    there = place.is_symlink() or place.exists()
    if there:
        place.rename(old)
    try:
        partial.rename(place)
    except OSError:
        if there:
            old.rename(place)
        raise
    if there:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
