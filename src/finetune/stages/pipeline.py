"""Stages in order, in one locked run directory. What the command line does, for Python and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.core.console import say
from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError, first_line
from finetune.core.files import digest, write_text
from finetune.core.secrets import redact
from finetune.recipe import Recipe, dump, load
from finetune.recipe.load import says_the_same
from finetune.run import Report, Run, checkpoints, evidence, layout, seal
from finetune.run.base import base_changed
from finetune.run.directory import RECIPE
from finetune.run.plan import BY_NAME, TRAININGS, Stage, inputs, plan
from finetune.run.restore import refuse_newer, restore
from finetune.stages.adopt import adopt
from finetune.stages.runner import fingerprint, outdated, reason, run_stage
from finetune.training import resuming
from finetune.training.job import job_of

Moment = Literal["start", "done", "kept"]
# Told what happens: a stage starts (no report yet), is done, or was kept because nothing had changed.
Listener = Callable[[Moment, Stage, Report | None], None]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What would happen to one stage. `why` is one phrase."""

    stage: str
    runs: bool
    why: str


def run_directory(recipe: Recipe, path: str | Path | None = None) -> Run:
    """The run that a recipe goes into: `path`, or `output_dir/name`."""
    return Run(path if path is not None else Path(recipe.output_dir) / recipe.name)


def chosen(recipe: Recipe, only: Iterable[str] | None = None) -> list[Stage]:
    """`plan`, refusing a stage that the recipe has no section for."""
    names = None if only is None else list(only)
    stages = plan(recipe, names)
    for name in names or ():
        if name not in {stage.name for stage in stages}:
            raise UsageError(f"the recipe does not ask for '{name}': it has no '{name}' section")
    return stages


def preview(
    recipe: Recipe, run: Run, only: Iterable[str] | None = None, *, force: bool = False, retrain: bool = False
) -> list[Planned]:
    """What `run_stages` would do, and why. Reads the run, writes nothing."""
    names = None if only is None else list(only)
    planned: list[Planned] = []
    another = _another_base(run)
    for stage in chosen(recipe, names):
        rerun = [before.stage for before in planned if before.runs and before.stage in stage.needs]
        why = _why(stage, recipe, run, rerun, force and (names is None or stage.name in names), retrain)
        why = why or (another if stage.name in TRAININGS else "")
        planned.append(Planned(stage=stage.name, runs=bool(why), why=why or "up to date"))
    return planned


def _another_base(run: Run) -> str:
    """Why trainings will be done anew though they do not know yet: the base model is not as it was fetched."""
    try:
        found = base_changed(run) if run.report("fetch") else []
    except FinetuneError:
        return ""
    return f"another base model: {found[0]}" if found else ""


def run_stages(
    recipe: Recipe,
    run: Run,
    only: Iterable[str] | None = None,
    *,
    force: bool = False,
    resume: Path | None = None,
    retrain: bool = False,
    changed: bool = False,
    listener: Listener = lambda moment, stage, report: None,
) -> list[Report]:
    """Run the stages whose inputs have changed and return the reports of all of them.

    `only` names stages (what they need runs too); `force` runs them (all, without `only`) again whatever was done;
    `resume` is the checkpoint that the last stage named in `only` starts from; without one, a training that was stopped
    goes on from its newest, unless `force`. A checkpoint of another training is refused; with `changed` only where nothing
    can go on from it. `retrain` does a finished training anew that other code or libraries made. The run is locked
    meanwhile, gets the recipe and the manifest, and is sealed at the end, whatever that is. Raises LockedError,
    ResourceError, NewerError, and whatever a stage raises, which becomes an event.
    """
    from finetune.training.estimate import check_start

    names = None if only is None else list(only)
    stages = chosen(recipe, names)
    reports = []
    with run.locked():
        refuse_newer(run)
        if force and names is None:
            seal.begin_anew(run)
        for said in restore(run):
            say(said)
        adopt(recipe, run)
        planned = preview(recipe, run, names, force=force, retrain=retrain)
        if any(step.runs and step.stage in TRAININGS for step in planned):
            check_start(recipe, run.path)
        early = resume is not None and not any(step.runs for step in planned[:-1])
        if resume is not None and early:
            refuse_another(stages[-1], recipe, run, resume, changed=changed)  # before anything is written
        store(recipe, run)
        try:
            for stage in stages:
                named = names is None or stage.name in names
                resumed = resume if names and stage.name == names[-1] else None
                if resumed is None and not (force and named):
                    resumed = left_off(stage, recipe, run)
                elif resumed is not None and not early:
                    refuse_another(stage, recipe, run, resumed, changed=changed)
                anew = (force and named) or resumed is not None
                report, ran = _one(stage, recipe, run, listener, resume=resumed, force=anew, retrain=retrain)
                listener("done" if ran else "kept", stage, report)
                reports.append(report)
        except BaseException:
            with suppress(OSError, FinetuneError):  # what failed first is what is told
                seal.close(run)
            raise
        _describe(recipe, run)
        seal.close(run)
    return reports


def _one(
    stage: Stage,
    recipe: Recipe,
    run: Run,
    listener: Listener,
    *,
    resume: Path | None,
    force: bool,
    retrain: bool,
) -> tuple[Report, bool]:
    """One stage, with an event of how it ended where that is not its end."""
    run.resume = resume
    try:
        return run_stage(
            stage, recipe, run, force=force, retrain=retrain, on_start=lambda stage: listener("start", stage, None)
        )
    except KeyboardInterrupt as error:
        run.event("stage_interrupted", stage=stage.name, message=redact(str(error)))
        raise
    except EOFError as error:  # left as it is, the command line would take it for Ctrl-D
        run.event("stage_failed", stage=stage.name, error="EOFError", message=redact(str(error)))
        raise StageError(f"a file that '{stage.name}' reads ends too early ({first_line(error)})") from error
    except Exception as error:
        run.event("stage_failed", stage=stage.name, error=type(error).__name__, message=redact(str(error)))
        raise
    finally:
        run.resume = None


def _describe(recipe: Recipe, run: Run) -> None:
    """What the manifest says of the run's stages: digests of data and model, and trainings kept from other code."""
    model = evidence.maybe(run, layout.MODEL)
    kept = {
        name: changes
        for name in TRAININGS
        if (done := run.report(name)) and (changes := outdated(BY_NAME[name], recipe, done))
    }
    seal.update_manifest(
        run,
        data=evidence.maybe(run, layout.SOURCES) or {},
        model={name: facts["sha256"] for name, facts in model["files"].items()} if model else {},
        kept=kept,
    )


def left_off(stage: Stage, recipe: Recipe, run: Run) -> Path | None:
    """The newest whole checkpoint of a training that did not end, whatever ended it, where it is of the same training; else
    it is said what differs. Damaged ones are named and passed over."""
    if stage.name not in TRAININGS or _has_report(run, stage.name):
        return None
    began = run.events("stage_started", stage=stage.name)
    found = checkpoints.stored(run.path / stage.name)
    if not found or not began:
        return None
    newest = checkpoints.newest_whole(found, lambda folder, faults: say(_passed_over(stage.name, folder, faults)))
    if newest is None:
        say(f"{stage.name}: starting anew, since no checkpoint is whole")
        return None
    same_inputs = began[-1].get("fingerprint") == fingerprint(stage, recipe, run)
    if why := resuming.why_anew(newest, job_of(stage.name, recipe, run), recipe.backend, run, same_inputs=same_inputs):
        say(f"{stage.name}: starting anew, not from {newest.name}, where it was stopped: {why}")
        return None
    say(f"{stage.name}: going on from {newest.name}, where it was stopped (--force starts anew)")
    return newest


def _passed_over(stage: str, folder: Path, faults: list[str]) -> str:
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{stage}: {folder.name} is damaged and passed over: {faults[0]}{more}"


def _has_report(run: Run, stage: str) -> bool:
    """Whether a stage finished; one whose report is damaged goes on from its checkpoints, as one that was killed does."""
    try:
        return run.report(stage) is not None
    except FinetuneError:
        return False


def refuse_another(stage: Stage, recipe: Recipe, run: Run, checkpoint: Path, *, changed: bool) -> None:
    """Raise Faults where a checkpoint is not of the training that the recipe asks for."""
    resuming.hold(checkpoint, job_of(stage.name, recipe, run), recipe.backend, run).refuse(changed=changed)


def store(recipe: Recipe, run: Run) -> None:
    """Write the recipe and the manifest into the run; a recipe that replaces another one is an event."""
    from finetune.data import secrecy
    from finetune.run.manifest import collect

    path, text = run.path / RECIPE, dump(recipe)
    secrecy.refuse_text(text, "the recipe")
    seal.update_manifest(run, **collect(recipe))
    replaced = path.is_file()
    kept = replaced and says_the_same(path.read_bytes().decode("utf-8", "replace"), text)
    if not kept or not seal.is_as_recorded(run, RECIPE):
        told = {
            "replaced": replaced,
            "name": recipe.name,
        }  # first, so that no recipe is there that the log does not know
        write_text(path, text, before=lambda partial: run.event("recipe", **told, sha256=digest(partial)))


def checkpoint(recipe: Recipe, run: Run, stage: str, wanted: str) -> Path:
    """The checkpoint that `--resume wanted` means for train or align: a directory, or `last`, the newest there is.

    Raises MissingError where there is none, UsageError for a directory that is none; both list those that exist.
    """
    section = recipe.train if stage == "train" else recipe.align
    places = [run.path / stage]
    if section is not None and section.output_dir:
        places.append(Path(section.output_dir))
    known = sorted((path for place in places for path in checkpoints.stored(place)), key=checkpoints.step_of)
    exist = f" Those that exist: {', '.join(str(path) for path in known)}." if known else ""
    if wanted == "last":
        if not known:
            where = " or ".join(str(place) for place in places)
            raise MissingError(f"nothing to resume: no checkpoint in {where}. Start with: finetune {stage} RECIPE")
        known.sort(key=lambda path: (checkpoints.step_of(path), path.stat().st_mtime))
        newest = checkpoints.newest_whole(known, lambda folder, faults: say(_passed_over(stage, folder, faults)))
        if newest is None:
            raise StageError(f"no checkpoint is whole. Start anew with: finetune {stage} RECIPE --force")
        return newest.resolve()
    for path in (Path(wanted), *(place / wanted for place in places)):
        if checkpoints.is_checkpoint(path):
            return path.resolve()
    if not Path(wanted).exists():
        raise MissingError(f"no checkpoint at {wanted}.{exist}")
    raise UsageError(f"{wanted} is not a checkpoint: it holds no trainer_state.json.{exist}")


def _why(stage: Stage, recipe: Recipe, run: Run, rerun: list[str], forced: bool, retrain: bool) -> str:
    """Why a stage would run; empty when it is up to date."""
    if forced:
        return "forced"
    before = f"'{rerun[0]}' runs before it" if rerun else ""
    try:
        found = reason(stage, recipe, run, retrain=retrain)
    except FinetuneError:  # what it stands on is damaged
        return before or "what it needs is damaged"
    if found is None:  # a training is kept, whatever is prepared again: it was asked for the same
        return before if stage.name not in TRAININGS or (rerun and rerun[0] in TRAININGS) else ""
    if not found.news:
        return "did not finish the last time" if run.events("stage_started", stage=stage.name) else found.why
    if found.why != "changed":
        return found.why
    changes = _changes(stage, recipe, run)
    return f"changed: {', '.join(changes)}" if changes else before or "its data or an earlier stage changed"


def _changes(stage: Stage, recipe: Recipe, run: Run) -> list[str]:
    """The recipe keys of this stage that differ from the stored recipe, at most three."""
    try:
        old = load(run.path / "recipe.yaml")
    except FinetuneError:
        return []
    before, after = (_flat(inputs(stage, each)) for each in (old, recipe))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys[:3]] + (["..."] if len(keys) > 3 else [])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    leaves: dict[str, Any] = {}
    for name, inner in value.items():
        leaves |= _flat(inner, f"{path}.{name}".lstrip("."))
    return leaves
