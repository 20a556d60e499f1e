"""Is everything there, unchanged, as it was trained, and does a process that knows nothing of the training load it and
answer the same?"""

from __future__ import annotations

import math
from pathlib import Path

from finetune.checks import Verdict, judge, missing, saved, worst
from finetune.checks.parts import single
from finetune.core.errors import StageError
from finetune.core.files import digest_of
from finetune.models.weights import count_parameters
from finetune.recipe import Recipe
from finetune.run import Report, Run, evidence, layout, seal
from finetune.run.plan import BY_NAME, MODELS, TRAININGS, plan
from finetune.run.records.evaluated import FRESH_QUESTIONS

FRESH = layout.FRESH.path
DRIFT = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # nats a token, by the rounding of each type


def _finished(recipe: Recipe, run: Run) -> Verdict:
    wanted = [stage.name for stage in plan(recipe)]
    reports = _reports(recipe, run)
    absent = [name for name in wanted if name not in reports]
    stale = _stale(run, reports)
    why = f"no report of: {', '.join(absent)}" if absent else "every stage of the recipe left its report"
    if stale:
        why += f"; ran before the model that is there now: {', '.join(stale)}"
    return judge("stages_finished", len(reports) - len(stale), "==", len(wanted), "stages", ".", why)


def _reports(recipe: Recipe, run: Run) -> dict[str, Report]:
    return {stage.name: report for stage in plan(recipe) if (report := run.report(stage.name))}


def _stale(run: Run, reports: dict[str, Report]) -> list[str]:
    """The stages after which a model was made again that they speak of: by the log's order, since clocks are set back.

    A training is kept where the one before it came to the same again.
    """
    ended = {event["stage"]: place for place, event in enumerate(run.events("stage_finished"))}
    began = {event["stage"]: event.get("of", {}) for event in run.events("stage_started")}
    found = []
    for name in reports:
        later = [
            need
            for need in BY_NAME[name].needs
            if need in MODELS and need in reports and ended.get(need, -1) > ended.get(name, math.inf)
        ]
        same = name in TRAININGS and all(
            began.get(name, {}).get(need) == digest_of(reports[need].artifacts) for need in later
        )
        found += [name] if later and not same else []
    return found


def _intact(recipe: Recipe, run: Run) -> Verdict:
    """Every file that a stage left is as it left it; a run of version 0.1 knows its artifacts alone."""
    reports = _reports(recipe, run)
    left = [name for report in reports.values() for name in (report.files or report.artifacts)]
    changed = [found for report in reports.values() for found in seal.changed(run, report)]
    why = f"{len(left)} artifacts" + (f"; {changed[0]}" if changed else "")
    share = max(0, len(left) - len(changed)) / len(left) if left else None
    return judge("artifacts_intact", share, "==", 1.0, "share", ".", why)


def _sizes(recipe: Recipe, run: Run) -> Verdict:
    """What the reports of `fetch` and `merge` say of sizes, against the files."""
    found = evidence.fetched(run)
    told, merged = (evidence.read(run, layout.report(stage))["metrics"] for stage in ("fetch", "merge"))
    model = evidence.required(run, layout.MERGED)
    sizes = {
        "the model asked for": (found["path"], recipe.model.path),
        "bytes of the model": (told["bytes"], sum(file["size"] for file in found["files"].values())),
        "parameters of the model": (told.get("parameters"), count_parameters(Path(found["base"]))),
        "bytes of the merged model": (
            merged.get("bytes"),
            sum(file.stat().st_size for file in model.rglob("*") if file.is_file()),
        ),
    }
    off = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    why = f"{', '.join(sizes)} are as reported"
    if off:
        name, (said, there) = next(iter(off.items()))
        why = f"{name}: reported {said}, there {there}"
    return judge("sizes_as_reported", len(off), "==", 0, "numbers off", layout.report("fetch").path, why)


def _fresh(recipe: Recipe, run: Run) -> Verdict:
    name, bound = "fresh_process", DRIFT[recipe.model.dtype]
    fresh = evidence.read(run, layout.FRESH)
    if fresh["template_sha256"] != evidence.read(run, layout.TEMPLATE)["sha256"]:
        return missing(name, "<=", bound, "nats a token", FRESH, "the merged model carries another chat template")
    of = fresh.get("of", "nothing")
    expected = _expected(run, of)
    shared = [key for key in fresh["scores"] if key in expected]
    if not shared or (of != "rows" and len(shared) < len(fresh["scores"])):  # of rows, `evaluate` scored a sample
        return missing(name, "<=", bound, "nats a token", FRESH, "nothing was scored, or what 'evaluate' knows not of")
    if of != "rows" and len(shared) < min(FRESH_QUESTIONS, len(expected)):
        why = f"{len(shared)} of the first {min(FRESH_QUESTIONS, len(expected))} answers were scored"
        return missing(name, "<=", bound, "nats a token", FRESH, why)
    distance = worst(abs(fresh["scores"][key] - expected[key]) for key in shared)
    why = f"merged model loaded in a process of its own, {len(shared)} answers scored; worst distance from 'evaluate'"
    return judge(name, distance, "<=", bound, "nats a token", FRESH, why)


def _expected(run: Run, of: str) -> dict[str, float]:
    """What `evaluate` says of the same, in the last phase."""
    if of == "answers":
        answers = evidence.rows(run, layout.ANSWERS)
        return {str(place): list(a["phases"].values())[-1]["logprob"] for place, a in enumerate(answers)}
    if of == "pairs":
        tokens = {pair["row"]: len(pair["chosen_ids"]) for pair in evidence.rows(run, layout.PAIRS)}
        pairs = evidence.rows(run, layout.SCORED_PAIRS)
        return {str(p["row"]): list(p["phases"].values())[-1]["chosen"] / tokens[p["row"]] for p in pairs}
    if of == "rows":
        rows = list(evidence.read(run, layout.ROW_SCORES).values())[-1]
        return {name: score["all"][0] / score["all"][1] for name, score in rows.items()}
    raise StageError(f"{FRESH} does not say what was scored")


def _ever(recipe: Recipe) -> bool:
    return True


PARTS = (
    single("stages_finished", _finished, ".", _ever),
    single("artifacts_intact", _intact, ".", _ever),
    single("sizes_as_reported", _sizes, layout.report("fetch").path, _ever),
    *saved.PARTS,
    single("fresh_process", _fresh, FRESH, _ever),
)
