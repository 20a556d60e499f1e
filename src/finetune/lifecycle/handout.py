"""What may leave a run: files that are as their stage left them, of a run whose every verdict holds.

`export --out` and `serve` ask here before they hand anything out. Nothing is hashed again to make it fit: a file that is
not the one that was listed is named, and it is for its stage to make it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.core.errors import FinetuneError, RefusedError, StageError, first_line
from finetune.core.files import digest
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout, outcome, seal
from finetune.run.base import base_changed
from finetune.run.directory import RECIPE, VERDICTS
from finetune.run.records.whole import StoredVerdicts
from finetune.run.report import FILE as REPORT
from finetune.run.seal import Found

NAMED = 20  # reasons that a refusal lists; a run may have lost hundreds of files
# What makes verdicts older than what they speak of.
_WORK = ("stage_started", "stage_finished", "recipe")


def refuse(run: Run, what: str, reasons: Sequence[str]) -> None:
    """Raise RefusedError where there are reasons to, with what can be done; `what` is what does not happen."""
    if not reasons:
        return
    more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    ways = [
        f"See every verdict with: finetune verify {run.path}",
        f"Make what is damaged again with: finetune run {run.path / RECIPE} --run {run.path}",
        "To go on all the same: --anyway",
    ]
    raise RefusedError(what, [*reasons[:NAMED], *more], ways)


# -- proof -------------------------------------------------------------------------------------------------------------


def verdicts(run: Run) -> StoredVerdicts:
    """The stored verdicts, where they stand for what is in the run now. Raises StageError with why they do not."""
    if not evidence.there(run, layout.VERDICTS):
        raise StageError("not verified")
    stored = evidence.read(run, layout.VERDICTS)
    if not seal.is_as_recorded(run, VERDICTS):
        raise StageError(f"{VERDICTS} was changed after it was written")
    if newer := _newer(run, stored["time"]):
        raise StageError(f"not verified since {newer}")
    return stored


def unproved(run: Run, recipe: Recipe) -> list[str]:
    """Why the verdicts do not stand for what is in the run now, or what they refute, a phrase each; none where all hold."""
    try:
        stored = verdicts(run)["verdicts"]
        left_out = _left_out(run, recipe, {verdict["name"] for verdict in stored})
    except FinetuneError as error:
        return [first_line(error)]
    refuted = [verdict["name"] for verdict in outcome.of(stored, outcome.REFUTED)]
    found = [f"refuted: {', '.join(refuted)}"] if refuted else []
    found += [f"not verified: {', '.join(left_out)}"] if left_out else []
    return found if outcome.of(stored, outcome.PROVED) else [*found, "nothing was proved"]


def _newer(run: Run, verified: str) -> str:
    """What was done after the verdicts were made; empty where nothing was."""
    events = run.events()
    known = [place for place, event in enumerate(events) if event["event"] == "verified"]
    if known:
        later = [event for event in events[known[-1] + 1 :] if event["event"] in _WORK]
        said = [f"the stage '{event['stage']}' ran" if "stage" in event else "the recipe changed" for event in later]
        return said[-1] if said else ""
    if seal.is_sealed(run):
        return "its log was made again"
    # Version 0.1 told no log that it verified.
    reports = [report for stage in layout.REPORTS if (report := run.report(stage))]
    return next((f"the stage '{each.stage}' ran" for each in reports if each.started > verified), "")


def _left_out(run: Run, recipe: Recipe, there: set[str]) -> list[str]:
    """Verdicts that are owed and are not among those stored, as after `verify --check`. Version 0.1 owed fewer."""
    if not seal.is_sealed(run):
        return [] if "artifacts_intact" in there else ["artifacts_intact"]
    from finetune.checks import CHECKS, owed

    return [name for check in CHECKS if check.wanted(recipe) for name in owed(check, recipe) if name not in there]


# -- files -------------------------------------------------------------------------------------------------------------


def unsealed(run: Run) -> list[Found]:
    """What is not as it was sealed, and reports that are gone; no file of a stage is read for it.

    Verdicts are left to `unproved`: every check writes them anew.
    """
    found = [each for each in seal.faults(run) if each.file != VERDICTS]
    reports = [layout.report(stage).path for stage in layout.REPORTS if stage in _finished(run)]
    return found + [Found(file=name, why="is gone") for name in reports if not (run.path / name).is_file()]


def damage(run: Run, but: Iterable[str] = ()) -> list[Found]:
    """What is not as it was sealed, and all that the stages left (`but` for these) that is not as they left it."""
    found = unsealed(run)
    for stage in layout.REPORTS:
        if stage in but:
            continue
        try:
            report = run.report(stage)
        except FinetuneError as error:
            found.append(Found(file=f"{stage}/{REPORT}", why=f"cannot be read: {first_line(error)}"))
        else:
            found += seal.changed(run, report) if report else []
    return found


def _finished(run: Run) -> set[str]:
    """The stages that the log says have finished and were not begun again; none where it cannot be read."""
    try:
        last = {event["stage"]: event["event"] for event in run.events() if event["event"].startswith("stage_")}
    except FinetuneError:  # `seal.faults` names it
        return set()
    return {stage for stage, event in last.items() if event == "stage_finished"}


def changed(run: Run, paths: Iterable[Path]) -> list[Found]:
    """Which of these files and folders, with all that is in them, are not as they were made: what is inside the run is held
    against its stage's report, the base model against what `fetch` saw."""
    found: list[Found] = []
    for path in paths:
        try:
            found += _inside(run, path) if path.resolve().is_relative_to(run.path) else _base(run, path)
        except FinetuneError as error:
            found.append(Found(file=path.name, why=f"cannot be told to be as it was made: {first_line(error)}"))
    return found


def _inside(run: Run, path: Path) -> list[Found]:
    name = path.resolve().relative_to(run.path).as_posix()
    stage = name.partition("/")[0]
    if name == RECIPE:
        return [] if seal.is_as_recorded(run, name) else [Found(file=name, why="was changed after it was written")]
    if stage == seal.SERVED:
        return []  # made of what is looked at, and known by its own digest (`serving.models.whole`)
    report = run.report(stage) if stage in layout.REPORTS else None
    if report is None:
        return [Found(file=name, why="was left by no stage that finished")]
    if not seal.is_as_recorded(run, f"{stage}/{REPORT}"):
        return [Found(file=f"{stage}/{REPORT}", why="was changed after it was written")]
    return seal.changed(run, report, name) or (_listed(run, path) if stage == "export" else [])


def _listed(run: Run, path: Path) -> list[Found]:
    """An export against the digest in the list of exports, which is one of its stage's files itself."""
    found = seal.changed(run, run.require("export"), layout.EXPORTS.path)
    for entry in evidence.read(run, layout.EXPORTS):
        place = run.path / entry["path"]
        # The digest of a Modelfile is that of its folder, with the weights; version 0.1 took the file's own.
        whole = place.parent if place.name == "Modelfile" and "files" in entry else place
        if path in (place, *place.parents) and place.exists() and digest(whole) != entry["sha256"]:
            found.append(Found(file=entry["path"], why=f"is not the one in {layout.EXPORTS.path}"))
    return found


def _base(run: Run, path: Path) -> list[Found]:
    fetched = evidence.fetched(run)
    if str(path) not in (fetched["base"], fetched["adapter"]):
        return [Found(file=str(path), why="lies outside of the run, and no stage knows what it was")]
    return _inside(run, run.path / layout.MODEL.path) + base_changed(run, path)
