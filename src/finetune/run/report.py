"""What one stage did, and the digests of all that it left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core import schemas
from finetune.core.files import digest_of, digests

if TYPE_CHECKING:
    from finetune.run.directory import Run

FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one stage did. `artifacts` maps paths inside the run directory to their SHA-256, `files` every file of the
    stage's folder to its own, whether it is a part of an artifact or not.

    `peak` holds bytes: `process` (resident set), and `device` where there is one. `seconds` is wall time. `made_with` is
    what computed it: modules by digest, libraries by version, Python (see `finetune.run.fingerprint`). `schema` is the number
    that it was written under: 0 in a run of version 0.1, which listed artifacts alone.
    """

    stage: str
    fingerprint: str
    started: str
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    asked: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    schema: int = schemas.REPORT.number


def left_by(stage: str, root: Path) -> dict[str, str]:
    """Every file in the folder of a stage but its report, by path inside the run, with its SHA-256."""
    return {f"{stage}/{name}": sha for name, sha in digests(root / stage).items() if name != FILE}


def made_of(run: Run, stages: Iterable[str]) -> dict[str, str]:
    """A digest of what each of these stages has left, of those that have finished."""
    return {stage: digest_of(report.artifacts) for stage in stages if (report := run.report(stage))}


def digest_in(files: dict[str, str], name: str) -> str | None:
    """The digest of an artifact, a file or a folder, made of those of `files`; None where it has no file there."""
    if name in files:
        return files[name]
    within = {path.removeprefix(f"{name}/"): sha for path, sha in files.items() if path.startswith(f"{name}/")}
    return digest_of(within) if within else None


def written_anew(report: Report, name: str, sha: str) -> Report:
    """The report of a stage one of whose files a command has written anew: that file's digest, and no other, is told again.

    Reports of version 0.1 list artifacts alone.
    """
    artifacts = {name: sha} if name in report.artifacts else {}
    files = {name: sha} if report.files else {}
    return replace(report, artifacts={**report.artifacts, **artifacts}, files={**report.files, **files})
