"""A stage carried out where its inputs, its code or its libraries have changed; what every report has, added to its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.core.clock import now
from finetune.core.console import say
from finetune.core.errors import FinetuneError, StageError, first_line
from finetune.core.files import digest, remove, sync_tree
from finetune.core.lookup import load
from finetune.run import Report, Run, seal
from finetune.run.plan import MODELS, TRAININGS, Stage, inputs, models_before, plan
from finetune.run.report import digest_in, left_by, made_of

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe


def fingerprint(stage: Stage, recipe: Recipe, run: Run) -> str:
    """A digest of all data that a stage's outcome depends on: its sections, its data files, what the stages before it left.

    A model that was made again makes those stages run again that speak of it, even if it is the same. What computes a stage,
    code and libraries, is its report's `made_with`.
    """
    before = {
        need: [report.started if need in MODELS else None, report.artifacts]
        for need in stage.needs
        if (report := run.report(need))
    }
    return _digest([inputs(stage, recipe), _data(stage, recipe), before])


def asked(stage: Stage, recipe: Recipe, run: Run) -> str:
    """A digest of what a training was asked for, whatever code carried it out: the sections and data files of all stages up
    to it, the base model's files, and the training that it goes on from."""
    from finetune.run import evidence, layout

    stages = plan(recipe, [stage.name])
    model = evidence.maybe(run, layout.MODEL)
    files = {name: facts["sha256"] for name, facts in model["files"].items()} if model else {}
    before = {need: report.artifacts for need in stage.needs if need in TRAININGS and (report := run.report(need))}
    return _digest([[[inputs(each, recipe), _data(each, recipe)] for each in stages], files, before])


def _data(stage: Stage, recipe: Recipe) -> dict[str, str]:
    from finetune.data.sources import local_files

    return {str(path): digest(path) for path in local_files(recipe, stage.name)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Reason:
    """Why a stage has to run: one phrase; whether it had finished before, so that the phrase is news; whether something that
    it left is damaged, so that nothing of it may be kept."""

    why: str
    news: bool = True
    damaged: bool = False


def reason(stage: Stage, recipe: Recipe, run: Run, *, retrain: bool = False) -> Reason | None:
    """Why a stage has to run; None where it finished with the same data, code and libraries, and what it left is there as
    it left it. A training that was asked for the same is kept whatever code made it, unless `retrain`; see `outdated`."""
    try:
        done = run.report(stage.name)
    except FinetuneError as error:
        return Reason(first_line(error), damaged=True)
    if done is None:
        return Reason("has not run yet", news=False)
    if found := seal.changed(run, done):
        return Reason(str(found[0]), damaged=True)
    if not seal.is_as_recorded(run, f"{stage.name}/report.json"):
        return Reason(f"{stage.name}/report.json was changed after it was written", damaged=True)
    if done.schema == 0:
        return Reason("made by version 0.1")
    if stage.name in TRAININGS and not retrain:
        return None if done.asked == asked(stage, recipe, run) else Reason("changed")
    if done.fingerprint != fingerprint(stage, recipe, run):
        return Reason("changed")
    if stage.name == "fetch" and (why := _fetched_anew(run)):
        return why
    changes = outdated(stage, recipe, done)
    return Reason(listed(changes)) if changes else None


def _fetched_anew(run: Run) -> Reason | None:
    """Where a file of the model, which lies outside of the run, is not the one that was fetched."""
    from finetune.run.base import base_changed

    found = base_changed(run)
    return Reason(str(found[0])) if found else None


def listed(changes: list[str], most: int = 3) -> str:
    """The first of some phrases, and how many more there are."""
    more = f" and {len(changes) - most} more" if len(changes) > most else ""
    return ", ".join(changes[:most]) + more


def outdated(stage: Stage, recipe: Recipe, done: Report) -> list[str]:
    """What has changed since in the code and the libraries that made a stage's result, a phrase each."""
    from finetune.run.fingerprint import changes
    from finetune.stages.doors import made_with

    if "finetune" in done.made_with:  # a training that was taken over
        return [f"finetune {done.made_with['finetune']} -> {__version__}"]
    return changes(done.made_with or None, made_with(stage, recipe))


def run_stage(
    stage: Stage,
    recipe: Recipe,
    run: Run,
    *,
    force: bool = False,
    retrain: bool = False,
    on_start: Callable[[Stage], None] = lambda stage: None,
) -> tuple[Report, bool]:
    """The stage's report, and whether it ran now. One that finished with the same inputs is not run again."""
    why = reason(stage, recipe, run, retrain=retrain)
    if why is None and not force:
        return run.require(stage.name), False
    from finetune.core.memory import PeakMemory
    from finetune.stages.doors import made_with

    if why and why.news and (run.resume or not force):
        say(f"{stage.name} runs again: {why.why}")
    mark = fingerprint(stage, recipe, run)
    run.forget(stage.name)
    if not stage.goes_on:
        _clear(stage, run)
    on_start(stage)
    started, begin = now(), time.perf_counter()
    run.event(
        "stage_started", stage=stage.name, fingerprint=mark, started=started, of=made_of(run, models_before(stage))
    )
    run.force = force or (why is not None and why.damaged)
    try:
        with PeakMemory() as memory:
            result = load(stage.reference)(recipe, run)
    finally:
        run.force = False
    sync_tree(run.stage_dir(stage.name))
    files = left_by(stage.name, run.path)
    report = Report(
        stage=stage.name,
        fingerprint=mark,
        asked=asked(stage, recipe, run) if stage.name in TRAININGS else None,
        started=started,
        seconds=round(time.perf_counter() - begin, 3),
        metrics=result.get("metrics", {}),
        artifacts={name: _listed(name, files) for name in _names(result.get("artifacts", []), run)},
        peak={"process": memory.peak, **result.get("peak", {})},
        notes=result.get("notes", []),
        files=files,
        made_with=asdict(made_with(stage, recipe)),
    )
    run.write_report(report)
    return report, True


def _clear(stage: Stage, run: Run) -> None:
    """Take away the records that a stage left before, which this recipe may not ask for."""
    from finetune.run import layout

    for file in layout.FILES:
        if file.stage == stage.name and not isinstance(file, layout.Tree):
            remove(run.path / file.path)


def _listed(name: str, files: Mapping[str, str]) -> str:
    found = digest_in(dict(files), name)
    if found is None:
        raise StageError(f"a stage says that it left {name}, and there is no file")
    return found


def _names(paths: Iterable[str | Path], run: Run) -> list[str]:
    return [Path(path).resolve().relative_to(run.path).as_posix() for path in paths]
