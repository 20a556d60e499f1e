"""Is everything there, unchanged, and does a process that knows nothing of the training load it and answer the same?"""

from __future__ import annotations

import json
from typing import Any

from finetune import evidence
from finetune.checks import Verdict, judge, missing
from finetune.recipe import Recipe
from finetune.run import Run, digest
from finetune.stages import plan

FRESH = "measure/fresh.json"
DRIFT = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # nats a token, by the rounding of each type


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    wanted = [stage.name for stage in plan(recipe)]
    reports = {name: report for name in wanted if (report := run.report(name))}
    absent = [name for name in wanted if name not in reports]
    verdicts = [
        judge(
            "stages_finished", len(reports), "==", len(wanted), "stages", ".",
            "every stage of the recipe left its report" if not absent else f"no report of: {', '.join(absent)}",
        )
    ]  # fmt: skip
    files = {name: sha for report in reports.values() for name, sha in report.artifacts.items()}
    gone = [name for name in files if not (run.path / name).exists()]
    changed = [name for name in files if name not in gone and digest(run.path / name) != files[name]]
    why = f"{len(files)} artifacts" + (
        f"; missing: {gone[0]}" if gone else f"; changed: {changed[0]}" if changed else ""
    )
    intact = len(files) - len(gone) - len(changed)
    verdicts.append(judge("artifacts_intact", intact / len(files) if files else None, "==", 1.0, "share", ".", why))
    verdicts.append(_fresh(recipe, run))
    return verdicts


def _fresh(recipe: Recipe, run: Run) -> Verdict:
    name, bound = "fresh_process", DRIFT[recipe.model.dtype]
    path = run.path / FRESH
    if not path.is_file():
        return missing(name, "<=", bound, "nats a token", FRESH, "no fresh process loaded the merged model")
    fresh = json.loads(path.read_text(encoding="utf-8"))
    template = evidence.read_json(run, "prepare/template.json", "prepare")["sha256"]
    if fresh["template_sha256"] != template:
        return missing(name, "<=", bound, "nats a token", FRESH, "the merged model carries another chat template")
    expected = _expected(run, fresh["of"])
    shared = [key for key in fresh["scores"] if key in expected]
    if not shared:
        return missing(name, "<=", bound, "nats a token", FRESH, "nothing was scored")
    worst = max(abs(fresh["scores"][key] - expected[key]) for key in shared)
    why = f"merged model loaded in a process of its own, {len(shared)} answers scored; worst distance from 'evaluate'"
    return judge(name, worst, "<=", bound, "nats a token", FRESH, why)


def _expected(run: Run, of: str) -> dict[str, float]:
    if of == "answers":
        answers = evidence.read_rows(run, "evaluate/answers.jsonl", "evaluate")
        return {str(place): list(a["phases"].values())[-1]["logprob"] for place, a in enumerate(answers)}
    rows: dict[str, Any] = list(evidence.read_json(run, "evaluate/rows.json", "evaluate").values())[-1]
    return {name: score["all"][0] / score["all"][1] for name, score in rows.items()}
