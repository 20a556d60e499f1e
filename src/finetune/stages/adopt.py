"""Trainings that version 0.1 finished, taken over: it knew code by its number alone, and its reports list no files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from finetune.core.errors import FinetuneError
from finetune.core.files import digest
from finetune.data.sources import local_files
from finetune.recipe import Recipe
from finetune.run import Report, Run, seal
from finetune.run.plan import TRAININGS, Stage, inputs, plan
from finetune.run.report import left_by
from finetune.stages.runner import asked, fingerprint

VERSION = "0.1.0"


def adopt(recipe: Recipe, run: Run) -> None:
    """Give every training of version 0.1 that this recipe still asks for a report of today's form, so that it is kept. One
    that was asked for something else, or whose files were changed since, is left as it is, and will be done anew."""
    reports = {stage.name: report for stage in plan(recipe) if (report := _report(run, stage.name))}
    same = {stage.name for stage in plan(recipe) if stage.name in reports and _is_same(stage, recipe, reports)}
    for name in TRAININGS:
        done = reports.get(name)
        stages = plan(recipe, [name]) if done else []
        if done and done.schema == 0 and {stage.name for stage in stages} <= same and not seal.changed(run, done):
            manifest = run.manifest()
            made_with = {"finetune": VERSION, "python": manifest["python"], "libraries": manifest["packages"]}
            run.write_report(
                replace(
                    done,
                    schema=Report.schema,
                    fingerprint=fingerprint(stages[-1], recipe, run),
                    asked=asked(stages[-1], recipe, run),
                    files=left_by(name, run.path),
                    made_with=made_with,
                )
            )


def _report(run: Run, stage: str) -> Report | None:
    try:
        return run.report(stage)
    except FinetuneError:
        return None


def _is_same(stage: Stage, recipe: Recipe, reports: dict[str, Report]) -> bool:
    """Whether a report's fingerprint is what version 0.1 gave for this recipe and these data files."""
    files = {str(path): digest(path) for path in local_files(recipe, stage.name)}
    before: dict[str, Any] = {
        need: [reports[need].fingerprint, reports[need].artifacts] for need in stage.needs if need in reports
    }
    text = json.dumps([VERSION, inputs(stage, recipe), files, before], sort_keys=True, default=str)
    return reports[stage.name].fingerprint == hashlib.sha256(text.encode()).hexdigest()
