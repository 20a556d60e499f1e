"""Runs as if they were verified, without the checks, and files damaged as disks and hands do it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finetune.checks import CHECKS, REFUTED, as_dict, judge, owed
from finetune.core.files import digest
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout, seal


def prove(run: Run, recipe: Recipe, *, refuted: Iterable[str] = (), but: Iterable[str] = ()) -> None:
    """Store a verdict on everything that the recipe calls for (`but` for some), as `verify` does: these refuted, the rest
    proved."""
    names = [name for check in CHECKS if check.wanted(recipe) for name in owed(check, recipe)]
    proved = [
        judge(name, 1.0, "==", 1.0, "share", ".", "as told") for name in [*dict.fromkeys(names)] if name not in but
    ]
    verdicts = [replace(each, outcome=REFUTED) if each.name in refuted else each for each in proved]
    path = evidence.write(run, layout.VERDICTS, as_dict(verdicts))
    run.event("verified", passed=not refuted, sha256=digest(path))
    seal.close(run)


def flip(file: Path) -> Path:
    """Change one bit in the middle of a file; where it is text, so that it stays text."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def whole_folder(run: Path) -> list[Path]:
    """Every file in a run, and every link."""
    return [path for path in run.rglob("*") if path.is_symlink() or path.is_file()]


def stated(bundle: Path) -> dict[str, str]:
    """The SHA-256 that a bundle's manifest states, by file."""
    files = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: fact["sha256"] for name, fact in files.items()}
