"""The stages, in order, and `execute`, which runs those whose inputs have changed.

A stage is a function `run(recipe, run) -> dict` that reads the run directory and writes into it, returning its
metrics, artifacts and notes; `execute` adds what every report has. Stage modules never import each other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__, tiny
from finetune.errors import UsageError
from finetune.lookup import load
from finetune.run import Report, Run, digest, now

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe

# A finished stage's result: metrics, artifact paths (relative to the run), notes.
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table. `sections` are the recipe's keys that the stage reads, `needs` the stages before it.

    `keys` narrows a section to those of its keys that the stage reads.
    """

    name: str
    run: str
    help: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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
        help="Supervised fine-tuning (SFT), full or LoRA.",
        sections=("backend", "model", "train"),
        needs=("prepare",),
        wanted=lambda recipe: recipe.train is not None,
    ),
    Stage(
        name="align",
        run="finetune.stages.align:run",
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
        help="Write the merged model in other formats: GGUF, MLX, Ollama, a bundle for the hub.",
        sections=("name", "backend", "model", "template", "export"),
        needs=("rehearse", "merge", "measure"),
        wanted=lambda recipe: bool(recipe.export),
    ),
    Stage(
        name="compare",
        run="finetune.stages.compare:run",
        help="Ask every export, in its own runtime, what the merged model was asked, and hold them side by side.",
        sections=("backend", "model", "template", "evaluate", "export"),
        needs=("evaluate", "merge", "export"),
        wanted=lambda recipe: bool(recipe.export),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


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


def inputs(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that a stage reads, as plain values; without the token."""
    sections = {*stage.sections, *(("data",) if stage.name == "fetch" and tiny.is_name(recipe.model.path) else ())}
    found = recipe.model_dump(mode="json", include=sections, exclude={"model": {"token"}})
    for section, keys in stage.keys.items():
        if found[section] is not None:
            found[section] = {key: found[section][key] for key in keys}
    return found


def fingerprint(stage: Stage, recipe: Recipe, run: Run) -> str:
    """A digest of all that a stage's outcome depends on: its sections, its data files, what the stages before it left,
    our version."""
    from finetune.data.sources import local_files

    files = {str(path): digest(path) for path in local_files(recipe, stage.name)}
    before = {need: [report.fingerprint, report.artifacts] for need in stage.needs if (report := run.report(need))}
    text = json.dumps([__version__, inputs(stage, recipe), files, before], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def execute(
    stage: Stage,
    recipe: Recipe,
    run: Run,
    *,
    force: bool = False,
    on_start: Callable[[Stage], None] = lambda stage: None,
) -> tuple[Report, bool]:
    """The stage's report, and whether it ran now. One that finished with the same inputs is not run again."""
    mark = fingerprint(stage, recipe, run)
    done = run.report(stage.name)
    if done and done.fingerprint == mark and not force and all((run.path / name).exists() for name in done.artifacts):
        return done, False
    from finetune.memory import PeakMemory

    run.forget(stage.name)
    on_start(stage)
    run.event("stage_started", stage=stage.name, fingerprint=mark)
    started, begin = now(), time.perf_counter()
    run.force = force
    try:
        with PeakMemory() as memory:
            result = load(stage.run)(recipe, run)
    finally:
        run.force = False
    report = Report(
        stage=stage.name,
        fingerprint=mark,
        started=started,
        seconds=round(time.perf_counter() - begin, 3),
        metrics=result.get("metrics", {}),
        artifacts={name: digest(run.path / name) for name in _names(result.get("artifacts", []), run)},
        peak={"process": memory.peak, **result.get("peak", {})},
        notes=result.get("notes", []),
    )
    run.write_report(report)
    run.event("stage_finished", stage=stage.name, seconds=report.seconds)
    return report, True


def _names(paths: Iterable[str | Path], run: Run) -> list[str]:
    return [Path(path).resolve().relative_to(run.path).as_posix() for path in paths]
