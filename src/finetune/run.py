"""Run: the directory where it happens, and Report: what one stage did in it.

    RUN/recipe.yaml  manifest.json  events.jsonl  verdicts.json  <stage>/report.json  <stage>/...

Everything that is written goes through `redact`, so no secret lands in a run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import LockedError, MissingError, StageError, UsageError
from finetune.secrets import redact


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory: of its sorted relative names and their digests."""
    if path.is_dir():
        total = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            total.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that others wrote (a model's config). Raises StageError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path} is not JSON ({error}); get the model again") from None
    if not isinstance(value, dict):
        raise StageError(f"{path} holds no JSON object; get the model again")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(_encode(redact(text)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(text: str) -> bytes:
    # Half of a surrogate pair has no UTF-8; as \ud83d it is what JSON calls it.
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file. A last line cut short by a killed writer is left out."""
    # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number != len(lines):
                why = error.msg if isinstance(error, json.JSONDecodeError) else error.reason
                raise StageError(f"{path}:{number}: not JSON ({why}); the file was changed by hand") from None
    return rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one stage did. `artifacts` maps paths inside the run directory to their SHA-256.

    `peak` holds bytes: `process` (resident set), and `device` where there is one. `seconds` is wall time.
    """

    stage: str
    fingerprint: str
    started: str
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Report:
        return cls(**value)


class Run:
    """A run directory. Opening one creates nothing; `create` does. `resume` is the checkpoint that the stage running
    now (train or align) starts from, `force` whether it was told to do everything anew; both are set for the time of a
    stage, nothing stores them."""

    resume: Path | None = None
    force: bool = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises MissingError where there is none."""
        run = cls(path)
        if not (run.path / "recipe.yaml").is_file():
            raise MissingError(f"no run at {run.path} (it holds no recipe.yaml). List runs with: finetune runs ls")
        return run

    def create(self) -> Run:
        """Make the directory. Raises UsageError where there can be none."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be a run directory: {error.strerror}. Choose another with --run DIR"
            ) from None
        return self

    def stage_dir(self, stage: str) -> Path:
        path = self.path / stage
        path.mkdir(parents=True, exist_ok=True)
        return path

    # -- events ---------------------------------------------------------------------------------------------------

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    def event(self, kind: str, **values: Any) -> None:
        """Append one event, as one line in one write, so that a killed process leaves at most its last line cut."""
        line = redact(json.dumps({"time": now(), "event": kind, **values}, ensure_ascii=False, default=str))
        with self.events_path.open("a+b", buffering=0) as stream:
            if size := stream.seek(0, os.SEEK_END):
                stream.seek(size - 1)
                if stream.read(1) != b"\n":
                    _drop_cut_line(stream)
            stream.write(_encode(f"{line}\n"))

    def events(self, kind: str | None = None, **match: Any) -> list[dict[str, Any]]:
        """The events of a kind (all when None) whose values equal `match`, oldest first."""
        if not self.events_path.is_file():
            return []
        return [
            event
            for event in read_jsonl(self.events_path)
            if (kind is None or event["event"] == kind) and all(event.get(k) == v for k, v in match.items())
        ]

    # -- reports --------------------------------------------------------------------------------------------------

    def report(self, stage: str) -> Report | None:
        """The report of a stage that finished, or None."""
        path = self.path / stage / "report.json"
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def require(self, stage: str) -> Report:
        """The report of a stage that must have run. Raises MissingError with the command that runs it."""
        report = self.report(stage)
        if report is None:
            raise MissingError(f"the stage '{stage}' has not run in {self.path}. Run it with: finetune {stage} RECIPE")
        return report

    def write_report(self, report: Report) -> None:
        write_json(self.path / report.stage / "report.json", asdict(report))

    def forget(self, stage: str) -> None:
        """Drop a stage's report before the stage runs again, so that a failed rerun leaves no stale one."""
        (self.path / stage / "report.json").unlink(missing_ok=True)

    # -- manifest -------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def update_manifest(self, **values: Any) -> None:
        write_json(self.path / "manifest.json", {**self.manifest(), **values})

    # -- lock -----------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the run directory for writing. Raises LockedError at once when another process holds it."""
        from filelock import FileLock, Timeout

        self.create()
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LockedError(
                f"{self.path} is in use by another finetune process. Wait for it, or give this run its own directory "
                "with --run DIR"
            ) from None
        try:
            yield self
        finally:
            lock.release()


def _drop_cut_line(stream: io.FileIO) -> None:
    """Shorten a file to its last whole line: what a killed writer left would spoil the next one."""
    stream.seek(0)
    stream.truncate(stream.readall().rfind(b"\n") + 1)


def now() -> str:
    """UTC, to the millisecond, ISO 8601."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
