"""Is everything there, unchanged, as it was trained, and does a process that knows nothing of the training load it and
answer the same?"""

from __future__ import annotations

import json
from typing import Any

from finetune.checks import Verdict, judge, missing, saved, worst
from finetune.core.files import digest
from finetune.errors import MissingError
from finetune.recipe import Recipe
from finetune.run import Report, Run, evidence
from finetune.stages import BY_NAME, plan

MODELS = ("train", "align", "merge", "export")  # stages that make a model which later ones speak of
FRESH = "measure/fresh.json"
DRIFT = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # nats a token, by the rounding of each type


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    wanted = [stage.name for stage in plan(recipe)]
    reports = {name: report for name in wanted if (report := run.report(name))}
    absent = [name for name in wanted if name not in reports]
    stale = [name for name in reports if _stale(name, reports)]
    why = f"no report of: {', '.join(absent)}" if absent else "every stage of the recipe left its report"
    if stale:
        why += f"; ran before the model that is there now: {', '.join(stale)}"
    verdicts = [judge("stages_finished", len(reports) - len(stale), "==", len(wanted), "stages", ".", why)]
    files = {name: sha for report in reports.values() for name, sha in report.artifacts.items()}
    gone = [name for name in files if not (run.path / name).exists()]
    changed = [name for name in files if name not in gone and digest(run.path / name) != files[name]]
    why = f"{len(files)} artifacts" + (
        f"; missing: {gone[0]}" if gone else f"; changed: {changed[0]}" if changed else ""
    )
    intact = len(files) - len(gone) - len(changed)
    verdicts.append(judge("artifacts_intact", intact / len(files) if files else None, "==", 1.0, "share", ".", why))
    verdicts += saved.check(recipe, run)
    verdicts.append(_fresh(recipe, run))
    return verdicts


def _stale(name: str, reports: dict[str, Report]) -> bool:
    """Whether a model that the stage speaks of was made again after it."""
    made = [reports[need] for need in BY_NAME[name].needs if need in MODELS and need in reports]
    return any(report.started > reports[name].started for report in made)


def _fresh(recipe: Recipe, run: Run) -> Verdict:
    name, bound = "fresh_process", DRIFT[recipe.model.dtype]
    path = run.path / FRESH
    if not path.is_file():
        return missing(name, "<=", bound, "nats a token", FRESH, "no fresh process loaded the merged model")
    fresh = json.loads(path.read_text(encoding="utf-8"))
    try:
        template = evidence.read_json(run, "prepare/template.json", "prepare")["sha256"]
        if fresh["template_sha256"] != template:
            return missing(name, "<=", bound, "nats a token", FRESH, "the merged model carries another chat template")
        expected = _expected(run, fresh["of"])
    except MissingError as error:
        return missing(name, "<=", bound, "nats a token", FRESH, str(error))
    shared = [key for key in fresh["scores"] if key in expected]
    if not shared:
        return missing(name, "<=", bound, "nats a token", FRESH, "nothing was scored")
    distance = worst(abs(fresh["scores"][key] - expected[key]) for key in shared)
    why = f"merged model loaded in a process of its own, {len(shared)} answers scored; worst distance from 'evaluate'"
    return judge(name, distance, "<=", bound, "nats a token", FRESH, why)


def _expected(run: Run, of: str) -> dict[str, float]:
    if of == "answers":
        answers = evidence.read_rows(run, "evaluate/answers.jsonl", "evaluate")
        return {str(place): list(a["phases"].values())[-1]["logprob"] for place, a in enumerate(answers)}
    if of == "pairs":
        tokens = {
            p["row"]: len(p["chosen_ids"]) for p in evidence.read_rows(run, "prepare/preferences.jsonl", "prepare")
        }
        pairs = evidence.read_rows(run, "evaluate/preferences.jsonl", "evaluate")
        return {str(p["row"]): list(p["phases"].values())[-1]["chosen"] / tokens[p["row"]] for p in pairs}
    rows: dict[str, Any] = list(evidence.read_json(run, "evaluate/rows.json", "evaluate").values())[-1]
    return {name: score["all"][0] / score["all"][1] for name, score in rows.items()}
