"""A run: the directory where it happens.

    RUN/recipe.yaml  manifest.json  events.jsonl  verdicts.json  <stage>/report.json  <stage>/...

What else may lie there is declared in `finetune.run.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.core import schemas
from finetune.core.errors import LockedError, MissingError, StageError, UsageError
from finetune.core.files import clear_partials, digest, make_way, read_object, remove, write_json
from finetune.core.secrets import detector, redact, redacted
from finetune.run import report as reports
from finetune.run.log import Line, Log
from finetune.run.report import Report

EVENTS, MANIFEST, RECIPE, VERDICTS, LOCK = "events.jsonl", "manifest.json", "recipe.yaml", "verdicts.json", ".lock"


class Run:
    """A run directory. Opening one creates nothing; `create` does. `resume` is the checkpoint that the stage running
    now (train or align) starts from, `force` whether it was told to do everything anew; both are set for the time of a
    stage. `written` are the files of no stage that were written through this object: the seal takes their new digests, and
    no others. Nothing stores them."""

    resume: Path | None = None
    force: bool = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.written: set[str] = set()
        self._log = Log(self.path / EVENTS)

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises MissingError where there is none."""
        run = cls(path)
        if not run.exists:
            raise MissingError(f"no run at {run.path} (it holds no {MANIFEST}). List runs with: finetune runs ls")
        return run

    @property
    def exists(self) -> bool:
        """Whether a run is here: its manifest or its events tell; a recipe alone may be anybody's project, and a manifest that
        lists files is a bundle's."""
        return (self.path / EVENTS).is_file() or _is_of_run(self.path / MANIFEST)

    def create(self) -> Run:
        """Make the directory. Raises UsageError where there can be none, and for a secret in its path: many files name it."""
        if found := detector()(str(self.path)):
            raise UsageError(f"the path of the run directory holds {found}. Choose another with --run DIR")
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
        return self.path / EVENTS

    def event(self, kind: str, **values: Any) -> None:
        """Append one event to the log (see `finetune.run.log`)."""
        self._log.append(kind, values)

    def log(self) -> list[Line]:
        """The lines of the log, oldest first. Raises StageError naming the first one that is no event."""
        return self._log.lines()

    def events(self, kind: str | None = None, **match: Any) -> list[dict[str, Any]]:
        """The events of a kind (all when None) whose values equal `match`, oldest first."""
        return [
            line.event
            for line in self.log()
            if (kind is None or line.event["event"] == kind) and all(line.event.get(k) == v for k, v in match.items())
        ]

    def forget_log(self) -> None:
        """Begin the log anew, where everything is done anew."""
        self.events_path.unlink(missing_ok=True)

    # -- reports --------------------------------------------------------------------------------------------------

    def report(self, stage: str) -> Report | None:
        """The report of a stage that finished, or None. Raises EvidenceError where it is damaged."""
        from finetune.run import evidence, layout

        stored = evidence.maybe(self, layout.report(stage))
        return None if stored is None else Report(**{schemas.KEY: 0, **stored})

    def require(self, stage: str) -> Report:
        """The report of a stage that must have run. Raises MissingError with the command that runs it."""
        report = self.report(stage)
        if report is None:
            raise MissingError(f"the stage '{stage}' has not run in {self.path}. Run it with: finetune {stage} RECIPE")
        return report

    def write_report(self, report: Report) -> None:
        """Store a report. An event holds its digest, so that one changed later is known; it comes first, so that there is no
        report that the log does not know, whatever ends the process in between."""
        path = self.path / report.stage / reports.FILE
        make_way(path)
        shown = {"metrics": redacted(report.metrics), "notes": [redact(note) for note in report.notes]}
        stored = schemas.REPORT.written({**asdict(report), **shown})
        if report.schema == 0:  # of version 0.1, and as little known: nobody listed its files
            stored = {key: value for key, value in stored.items() if key not in (schemas.KEY, *schemas.REPORT.since)}
        told = {"stage": report.stage, "seconds": report.seconds}
        write_json(path, stored, before=lambda partial: self.event("stage_finished", **told, report=digest(partial)))

    def forget(self, stage: str) -> None:
        """Drop a stage's report before the stage runs again, so that a failed rerun leaves no stale one."""
        remove(self.path / stage / reports.FILE)

    # -- manifest -------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What is known of the run as a whole; empty before it began. Raises EvidenceError where it is damaged."""
        from finetune.run import evidence, layout

        return dict(evidence.maybe(self, layout.MANIFEST) or {})

    # -- lock -----------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the run directory for writing. Raises LockedError at once when another process holds it."""
        from filelock import FileLock, Timeout

        self.create()
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LockedError(
                f"{self.path} is in use by another finetune process. Wait for it, or give this run its own directory "
                "with --run DIR"
            ) from None
        try:
            clear_partials(self.path)
            yield self
        finally:
            lock.release()


def _is_of_run(manifest: Path) -> bool:
    """Whether a file is a run's manifest, damaged or not."""
    try:
        return manifest.is_file() and "files" not in read_object(manifest)
    except StageError:
        return True
