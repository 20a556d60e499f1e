"""What a sabotage works on: a recipe, the functions of all packages, and the files that stages leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.files import digest, digest_of, write_json, write_jsonl
from finetune.run import Run
from finetune.run.directory import MANIFEST, RECIPE
from finetune.run.layout import REPORTS
from finetune.run.log import FIRST, PREVIOUS
from finetune.run.report import FILE as REPORT
from finetune.run.report import digest_in, left_by
from finetune.run.seal import digest_of_manifest
from sabotage.baseline import put

Change = Callable[[Run], None]


@dataclass(frozen=True)
class Patch:
    """What is done to `module:attribute`: calls of it are handed on to `function`, or, where it `makes` a value, what
    `function(original)` gives is put in its place."""

    target: str
    function: Callable[..., Any]
    makes: bool = False


@dataclass(kw_only=True)
class Context:
    """`recipe` is the mapping that a run is made from, `folder` a place for files of its own; what is to be patched and
    changed is collected, and done later."""

    folder: Path = field(default_factory=Path)
    recipe: dict[str, Any] = field(default_factory=dict)
    patches: list[Patch] = field(default_factory=list)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Set a key of the recipe: `train.learning_rate`."""
        self.settings.append(key)
        put(self.recipe, key, value)

    def wrap(self, target: str, patch: Callable[..., Any]) -> None:
        """Call `patch(original, *arguments, **named)` in place of the function `module:attribute`, in every process of the
        run. The method `module:Class.attribute` is called with its object: `patch(original, self, ...)`, and so is
        `original(self, ...)`."""
        self.patches.append(Patch(target, patch))

    def put(self, target: str, make: Callable[[Any], Any]) -> None:
        """Put `make(original)` in the place of `module:attribute`: of a constant, a class or a property, which `wrap` is not
        for. It is made once in each process."""
        self.patches.append(Patch(target, make, makes=True))

    def after(self, stage: str, change: Change) -> None:
        """Call `change(run)` when a stage has finished; the stage's report is then made to fit what is there."""
        self.changes.setdefault(stage, []).append(change)


def as_if_written_so(run: Run, *stages: str, missed: bool = True) -> None:
    """Renew the digests in the reports of some stages, in the log and in the manifest, so that a change is no broken seal,
    but what was written so at the time. A file that is gone stays in its report, where it is `missed`; an artifact
    that is gone as a whole does in any case."""
    for stage in stages:
        file = run.path / stage / REPORT
        report = json.loads(file.read_text(encoding="utf-8"))
        there = left_by(stage, run.path)
        report["files"] = {**report["files"], **there} if missed else there
        report["artifacts"] |= {name: sha for name in report["artifacts"] if (sha := digest_in(there, name))}
        write_json(file, report)
    lines = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").split("\n")[:-1]]
    told = {name: _artifacts(run, name) for name in REPORTS if (run.path / name / REPORT).is_file()}
    written = {RECIPE: "recipe", **{f"{name}/{REPORT}": "stage_finished" for name in REPORTS}}
    before = FIRST
    for event in lines:
        for name, kind in written.items():
            if (
                event["event"] == kind
                and (run.path / name).is_file()
                and name in (RECIPE, f"{event.get('stage')}/{REPORT}")
            ):
                event["sha256" if name == RECIPE else "report"] = digest(run.path / name)
        if "of" in event:
            event["of"] |= {name: digest_of(told[name]) for name in event["of"] if name in told}
        event[PREVIOUS] = before
        before = hashlib.sha256(json.dumps(event, ensure_ascii=False).encode()).hexdigest()
    write_jsonl(run.events_path, lines)
    manifest = json.loads((run.path / MANIFEST).read_text(encoding="utf-8"))
    manifest["seal"] = {**manifest.get("seal", {"files": {}}), "lines": len(lines), "last": before}
    write_json(run.path / MANIFEST, {**manifest, "digest": digest_of_manifest(manifest)})


def _artifacts(run: Run, stage: str) -> dict[str, str]:
    told: dict[str, str] = json.loads((run.path / stage / REPORT).read_text(encoding="utf-8")).get("artifacts", {})
    return told
