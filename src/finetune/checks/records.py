"""Whether every file that holds records holds nothing else, and the log, the reports and the files tell of one another."""

from __future__ import annotations

from typing import Any

from finetune.checks import Part, Verdict, counts, judge, missing
from finetune.core.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Report, Run, evidence, layout, seal
from finetune.run.log import is_chained
from finetune.run.plan import BY_NAME, models_before, plan
from finetune.run.report import digest_in, made_of

EVENTS = layout.EVENTS.path


# -- the records themselves --------------------------------------------------------------------------------------------


def _whole(recipe: Recipe, run: Run) -> list[Verdict]:
    """Every record of every file read, those that no other check reads too; and every event."""
    stages = {stage.name for stage in plan(recipe)}
    files = [file for file in layout.FILES if file.stage in stages and evidence.there(run, file)]
    files += [row for name in ("merged", *recipe.export) if evidence.there(run, row := layout.comparison(name))]
    if not files:
        return [missing("records_whole", "==", 0, "damaged", EVENTS, "no stage left a record")]
    faults = [(file.path, fault) for file in files if (fault := _fault(run, file))]
    faults += [(EVENTS, fault) for fault in evidence.event_faults(run)]
    place, why = EVENTS, f"{len(files)} files and the log hold what is declared of them, and nothing else"
    if faults:
        place, why = faults[0]
        why += f"; {len(faults)} in all" if len(faults) > 1 else ""
    return [judge("records_whole", len(faults), "==", 0, "damaged", place, why)]


def _fault(run: Run, file: layout.File) -> str:
    """What is wrong with a file of records; nothing to say of others."""
    try:
        if isinstance(file, layout.Document):
            evidence.read(run, file)
        elif isinstance(file, layout.Rows):
            evidence.rows(run, file)
        elif isinstance(file, layout.Text):
            evidence.text(run, file)
    except FinetuneError as error:
        return str(error)
    return ""


# -- what they tell of one another -------------------------------------------------------------------------------------


def _told(recipe: Recipe, run: Run) -> list[Verdict]:
    """The log tells of every report, and every report of what its stage left. Of version 0.1 only what it could tell."""
    events, found = run.events(), []
    for stage in plan(recipe):
        try:
            report = run.require(stage.name)
            found += [f"{stage.name}/report.json: {fault}" for fault in _of_report(run, report)]
            found += [f"{EVENTS}: {fault}" for fault in _of_log(run, report, events)]
        except FinetuneError as error:  # of this stage; the others are told of all the same
            found.append(first_line(error))
    if is_chained(run.log()):
        found += [f"{EVENTS}: {fault}" for fault in _of_recipe(recipe, run, events)]
    why = f"{len(events)} events, {len(plan(recipe))} reports and the files of all stages tell of one another"
    if found:
        why = found[0] + (f"; {len(found)} in all" if len(found) > 1 else "")
    return [judge("told_of", len(found), "==", 0, "untold", EVENTS, why)]


def _of_report(run: Run, report: Report) -> list[str]:
    """Artifacts are made of the files listed; every record and folder that is declared and there is an artifact."""
    if report.schema == 0 or not report.files:
        return []
    found = [
        f"{name} is not made of the files listed"
        for name, sha in report.artifacts.items()
        if digest_in(report.files, name) != sha
    ]
    declared = [file for file in layout.FILES if file.stage == report.stage and file not in layout.REPORTS.values()]
    there = [file.path for file in declared if evidence.there(run, file)]
    there += [
        path.relative_to(run.path).as_posix()
        for path in sorted((run.path / report.stage).glob("*.json*"))
        if path.name != "report.json"
    ]
    if report.stage == "export":  # into folders, named as the formats are
        there += ["/".join(entry["path"].split("/")[:2]) for entry in evidence.read(run, layout.EXPORTS)]
    if not report.made_with.get("modules") and "finetune" not in report.made_with:
        found.append("it does not say what code made it")
    found += [f"{name} is not listed as an artifact" for name in dict.fromkeys(there) if name not in report.artifacts]
    return found


def _of_log(run: Run, report: Report, events: list[dict[str, Any]]) -> list[str]:
    ended = [event for event in events if event["event"] == "stage_finished" and event.get("stage") == report.stage]
    begun = [event for event in events if event["event"] == "stage_started" and event.get("stage") == report.stage]
    if not ended or not begun:
        return [f"it does not tell that the stage {report.stage} {'ended' if begun else 'began'}"]
    if report.schema == 0 or "finetune" in report.made_with:
        return []
    found = (
        []
        if begun[-1].get("fingerprint") == report.fingerprint
        else [f"{report.stage} began with other inputs than its report says"]
    )
    of = begun[-1].get("of", {})
    there = made_of(run, models_before(BY_NAME[report.stage]))  # what is gone is told of by itself
    if "of" not in begun[-1] or any(of.get(name) != sha for name, sha in there.items()):
        found.append(f"{report.stage} began with other models than are there")
    if begun[-1].get("started") != report.started:
        found.append(f"{report.stage} began at {begun[-1].get('started')}, at {report.started} as its report says")
    if ended[-1].get("seconds") != report.seconds:
        found.append(f"{report.stage} took {ended[-1].get('seconds')} s, {report.seconds} as its report says")
    if "report" not in ended[-1]:
        found.append(f"it holds no digest of the report of {report.stage}")
    return found


def _of_recipe(recipe: Recipe, run: Run, events: list[dict[str, Any]]) -> list[str]:
    stored = [event for event in events if event["event"] == "recipe"]
    restored = any(event["event"] == "log_restored" for event in events)
    found = []
    if not stored and not restored:
        found.append("it does not tell which recipe was stored")
    elif stored and (stored[-1].get("name") != recipe.name or not seal.is_as_recorded(run, layout.RECIPE.path)):
        found.append(f"the recipe stored last was '{stored[-1].get('name')}', not this one")
    for stage, section in (("train", recipe.train), ("align", recipe.align)):
        begun = [event for event in events if event["event"] == "training" and event.get("stage") == stage]
        wanted = ("sft" if stage == "train" else "dpo", recipe.train.method if recipe.train else "lora")
        told = (begun[-1].get("objective"), begun[-1].get("method")) if begun else wanted
        if section is not None and told != wanted and not restored:
            found.append(f"the stage {stage} trained {told}, and the recipe asks for {wanted}")
    return found


PARTS = (
    *counts.PARTS,
    Part(check=_whole, owes=lambda recipe: ["records_whole"], evidence=EVENTS),
    Part(check=_told, owes=lambda recipe: ["told_of"], evidence=EVENTS),
)
