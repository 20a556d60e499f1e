"""What a sabotage works on: a recipe, the functions of all packages, and the files that stages leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.files import digest, write_json
from finetune.run import Run
from finetune.testing.sabotage.ground import put

Wrapper = Callable[[Any], Any]
Change = Callable[[Run], None]


@dataclass(kw_only=True)
class Scene:
    """`recipe` is the mapping that a run is made from, `folder` a place for files of its own; what is to be patched and
    changed is collected, and done later."""

    folder: Path = field(default_factory=Path)
    recipe: dict[str, Any] = field(default_factory=dict)
    patches: list[tuple[str, str, Wrapper]] = field(default_factory=list)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Set a key of the recipe: `train.learning_rate`."""
        self.settings.append(key)
        put(self.recipe, key, value)

    def wrap(self, target: str, wrapper: Wrapper) -> None:
        """Replace `module:attribute` (or `module:Class.attribute`) by `wrapper(original)` once its module is imported, in
        every process of the run."""
        module, _, attribute = target.partition(":")
        self.patches.append((module, attribute, wrapper))

    def after(self, stage: str, change: Change) -> None:
        """Call `change(run)` when a stage has finished; the stage's report is then made to fit what is there."""
        self.changes.setdefault(stage, []).append(change)


def as_if_written_so(run: Run, stage: str) -> None:
    """Renew the digests in a stage's report, so that a change is no broken artifact, but what the stage itself wrote. A file
    that is gone stays in the report: it is missed."""
    file = run.path / stage / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    there = [name for name in report["artifacts"] if (run.path / name).exists()]
    report["artifacts"].update({name: digest(run.path / name) for name in there})
    write_json(file, report)
