"""A run sealed: whatever is changed after it was written is named.

- The log is a chain (`finetune.run.log`): each line holds the digest of the one before.
- The log holds the digests of the recipe, of every stage's report and of the verdicts, as they were written.
- A report holds the digest of every file that its stage left.
- The manifest holds, when a command ends, how long the log is and how it ends, the digests of the files that are left
  (the reports to look at), and its own digest.

Paths are relative to the run, so that a run may be copied and moved. A seal is never made again over a change: where the
log is not what was sealed, it stays as it is, and `verify` says so until the run is done anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.core import schemas
from finetune.core.errors import FinetuneError, first_line
from finetune.core.files import digest, digests, write_json
from finetune.core.secrets import redacted
from finetune.run.directory import EVENTS, LOCK, MANIFEST, RECIPE, VERDICTS, Run
from finetune.run.log import Line, broken, is_chained
from finetune.run.report import FILE as REPORT
from finetune.run.report import Report, digest_in

SERVED = "serve"  # a folder of copies, made where one is asked for
WRITTEN = {RECIPE: "recipe", VERDICTS: "verified"}  # files whose digest an event holds, under `sha256`


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing that is not as it was sealed: the file inside the run (with a line of the log), and what is wrong."""

    file: str
    why: str

    def __str__(self) -> str:
        return f"{self.file} {self.why}"


# -- writing -----------------------------------------------------------------------------------------------------------


def update_manifest(run: Run, **values: Any) -> None:
    """Change what the manifest says, without secrets, and its digest with it; its seal stays what it was."""
    try:
        before = run.manifest()
    except FinetuneError:
        before = {}  # damaged: what it says is collected anew
    _store(run, {**before, **redacted(values)})


def close(run: Run) -> None:
    """Seal a run as it is, at the end of a command that wrote into it. Not where log or manifest are damaged or not what
    was sealed before, nor one of version 0.1: what nobody sealed would look as if it had never been changed."""
    try:
        lines, manifest = run.log(), run.manifest()
    except FinetuneError:  # `faults` names it
        return
    if list(log_faults(manifest, lines)) or not own(run, manifest, lines) or not is_sealed(run):
        return
    there = {name: sha for name, sha in digests(run.path).items() if name not in (MANIFEST, EVENTS, LOCK)}
    before = manifest.get("seal", {}).get("files", {})
    rest = {
        name: sha if name not in before or name in run.written else before[name]
        for name, sha in {**before, **there}.items()
        if _is_of_no_stage(name)
    }
    last = lines[-1].digest if lines else ""
    _store(run, {**manifest, "seal": {"lines": len(lines), "last": last, "files": rest}})


def begin_anew(run: Run) -> None:
    """Take the log away and what the manifest sealed of it, where everything is done anew."""
    run.forget_log()
    try:
        sealed = run.manifest().get("seal")
    except FinetuneError:  # damaged: `restore` makes it again
        return
    if sealed:
        update_manifest(run, seal={"lines": 0, "last": "", "files": {}})


def _store(run: Run, manifest: dict[str, Any]) -> None:
    rest = schemas.MANIFEST.written({key: value for key, value in manifest.items() if key != "digest"})
    # JSON knows fewer kinds of values than Python, so the digest is of what is read back.
    stored = json.loads(json.dumps(rest, default=str))
    write_json(run.path / MANIFEST, {**stored, "digest": digest_of_manifest(stored)})


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this digest, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def own(run: Run, manifest: Mapping[str, Any], lines: list[Line]) -> bool:
    """Whether a manifest is as it was written; that of a run of version 0.1 cannot tell."""
    from finetune.run import evidence, layout

    if schemas.KEY not in manifest:
        return not _seals(run, manifest, lines)
    stored = evidence.raw(run, layout.MANIFEST)  # as it was written, whatever its schema
    return bool(stored.get("digest") == digest_of_manifest(stored))


def _is_of_no_stage(name: str) -> bool:
    """Models that are made and taken away for serving hold their own digests (`finetune.serving.models`)."""
    from finetune.run.layout import REPORTS

    return name not in WRITTEN and name.partition("/")[0] not in (*REPORTS, SERVED)


# -- reading -----------------------------------------------------------------------------------------------------------


def is_sealed(run: Run) -> bool:
    """Whether this run was made by a version that seals; those of 0.1 did not, though what is done to them now is chained."""
    try:
        return _seals(run, run.manifest(), run.log())
    except FinetuneError:
        return True


def _seals(run: Run, manifest: Mapping[str, Any], lines: list[Line]) -> bool:
    """By all that tells of it, so that a seal cannot be taken away and the rest left: manifest, log, reports."""
    from finetune.run.layout import REPORTS

    if schemas.KEY in manifest or is_chained(lines[:1]) or not str(manifest.get("finetune", "0.1.")).startswith("0.1."):
        return True
    return any(report.schema > 0 for stage in REPORTS if (report := run.report(stage)) is not None)


def faults(run: Run) -> list[Found]:
    """All that is not as it was sealed, but for what stages left (see `Report.files` and `changed`)."""
    try:
        lines = run.log()
    except FinetuneError as error:
        return [Found(file=EVENTS, why=f"cannot be read: {first_line(error)}")]
    if not (run.path / MANIFEST).is_file():
        return [Found(file=MANIFEST, why="is not there"), *_chain(lines)]
    try:
        manifest = run.manifest()
    except FinetuneError as error:
        return [Found(file=MANIFEST, why=f"cannot be read: {first_line(error)}"), *_chain(lines)]
    found = [] if own(run, manifest, lines) else [Found(file=MANIFEST, why="was changed after it was written")]
    found += log_faults(manifest, lines)
    found += _written(run, lines)
    return [*found, *_rest(run, manifest, lines)]


def log_faults(manifest: Mapping[str, Any], lines: list[Line]) -> Iterator[Found]:
    """Where the chain of the log breaks, and where it is not what the manifest sealed."""
    yield from _chain(lines)
    seal = manifest.get("seal")
    if not seal or not seal["lines"]:
        return
    if len(lines) < seal["lines"]:
        yield Found(file=EVENTS, why=f"has {len(lines)} lines, and had {seal['lines']}: the end is gone")
    elif lines[seal["lines"] - 1].digest != seal["last"]:
        yield Found(file=f"{EVENTS}:{seal['lines']}", why="was changed after the run was sealed")


def _chain(lines: list[Line]) -> Iterator[Found]:
    if line := broken(lines):
        before = max(1, line.number - 1)
        yield Found(file=f"{EVENTS}:{before}", why="was changed, or a line after it was taken out or put in")


def _written(run: Run, lines: list[Line]) -> Iterator[Found]:
    """Files whose digest the log holds: the recipe, the verdicts, the reports of the stages."""
    for name, sha in recorded(lines).items():
        path = run.path / name
        if not path.is_file():
            # A report is taken away before its stage runs again; verdicts that are gone are made anew by every check.
            if name == RECIPE or path.exists():
                yield Found(file=name, why="is no file" if path.exists() else "is gone")
        elif digest(path) != sha:
            yield Found(file=name, why="was changed after it was written")


def recorded(lines: list[Line]) -> dict[str, str]:
    """The digests that the log holds of files inside the run, by path: the last of each."""
    found: dict[str, str] = {}
    for line in lines:
        event = line.event
        if event["event"] == "stage_finished" and "report" in event:
            found[f"{event['stage']}/{REPORT}"] = event["report"]
        for name, kind in WRITTEN.items():
            if event["event"] == kind and "sha256" in event:
                found[name] = event["sha256"]
    return found


def is_as_recorded(run: Run, name: str) -> bool:
    """Whether a file is the one whose digest the log holds; True where it holds none, as logs of version 0.1."""
    sha = recorded(run.log()).get(name)
    return sha is None or digest(run.path / name) == sha


def _rest(run: Run, manifest: Mapping[str, Any], lines: list[Line]) -> Iterator[Found]:
    """The files of no stage. Where the log went on after the seal, a command was killed, and they may be newer."""
    seal = manifest.get("seal")
    if not seal or len(lines) > seal["lines"]:
        return
    for name, sha in seal["files"].items():
        path = run.path / name
        if not path.is_file():
            yield Found(file=name, why="is gone")
        elif digest(path) != sha:
            yield Found(file=name, why="was changed after the run was sealed")


def changed(run: Run, report: Report, within: str | None = None) -> list[Found]:
    """What a stage left that is not as it left it: files changed, gone, or there that it did not write.

    With `within`, a file or folder by its path inside the run, no other file is read.
    """
    place = within or report.stage
    there = _there(run, place)
    if report.schema == 0:  # of version 0.1, which listed artifacts alone
        if not any(_covers(place, name) or _covers(name, place) for name in report.artifacts):
            return [
                Found(file=place, why="was listed nowhere by version 0.1: nothing tells whether it is as it was made")
            ]
        return [*_artifacts(run, report, place, there)]
    listed = {name: sha for name, sha in report.files.items() if _covers(place, name)}
    found = [
        Found(file=name, why="is gone" if name not in there else "was changed after it was written")
        for name, sha in listed.items()
        if there.get(name) != sha
    ]
    found += [Found(file=name, why="was not written by this stage") for name in there if name not in listed]
    if within and not listed and not found:
        found = [Found(file=place, why="is not there, and its stage did not write it")]
    return found or [*_artifacts(run, report, place, there)]


def _there(run: Run, place: str) -> dict[str, str]:
    """The digests of a file, or of all files in a folder, by path inside the run; without a stage's report."""
    path = run.path / place
    found = {place: digest(path)} if path.is_file() else {f"{place}/{name}": sha for name, sha in digests(path).items()}
    return {name: sha for name, sha in found.items() if name.partition("/")[2] != REPORT}


def _covers(place: str, name: str) -> bool:
    return name == place or name.startswith(f"{place}/")


def _artifacts(run: Run, report: Report, place: str, there: dict[str, str]) -> Iterator[Found]:
    """Artifacts in a place; those that the place is a part of are read whole. A place without any is a fault itself."""
    listed = {name: sha for name, sha in report.artifacts.items() if _covers(place, name) or _covers(name, place)}
    for name, sha in listed.items():
        now = digest_in(there if _covers(place, name) else _there(run, name), name)
        if now != sha:
            yield Found(file=name, why="is gone" if now is None else "was changed after it was written")
