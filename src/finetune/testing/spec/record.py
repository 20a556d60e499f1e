"""A spec from a good run: its numbers as bounds, each with the headroom that it was given."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checks import CHECKS
from finetune.checks.expected import EXPECT_KEYS
from finetune.core.errors import FinetuneError, UsageError
from finetune.core.files import write_text
from finetune.recipe import Recipe, dump, load, yaml
from finetune.recipe.examples import locate
from finetune.report.summary import reports, verdicts
from finetune.report.terminal import number
from finetune.run import Run, evidence, outcome
from finetune.testing.spec import load as specs
from finetune.testing.spec.judge import HEADROOM
from finetune.testing.spec.load import repository
from finetune.testing.spec.model import EXAMPLE_PREFIX, OWN_KEYS
from finetune.training.estimate import MIB

LEAST_HEADROOM = 0.05  # nats: a share of a loss near zero is less than what rounds differently elsewhere
TIME_HEADROOM = 1.0  # another machine, or this one on a busy day
START_SECONDS = 20  # imports and checks, which no stage counts
TIMEOUT_FACTOR = 3
LEAST_TIMEOUT = 60
# Exact or yes-or-no: no headroom makes a better bound than the recipe's own.
_NOT_RECORDED = ("loss_is_of_answers", "loss_end")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a run's recipe is: its folder, what a spec's `config` says, and the overrides that it was run with."""

    folder: Path
    config: str
    overrides: dict[str, Any]


def record(
    run: Run,
    out: Path,
    recipe_file: Path | None = None,
    *,
    options_of: Callable[[list[str]], dict[str, Any] | None] = lambda words: None,
) -> Path:
    """Write a spec for the run's recipe to `out`. Raises UsageError for a run that is not good. `options_of` reads the words
    of the command that made the run: the values of its options by name, None for a command that it does not know.

    A bound is the measured value and 25 % on top (of times 100 %), and never looser than the recipe's own.
    """
    stored = verdicts(run)
    if stored is None:
        raise UsageError(
            f"{run.path} was never verified, so nothing says that it is good. Try: finetune verify {run.path}"
        )
    if not stored["passed"]:
        raise UsageError(f"{run.path} is not a good run to record: {outcome.headline(stored['verdicts'])}")
    recipe = load(run.path / "recipe.yaml")
    root = repository(out.absolute()) or Path.cwd()
    source = (
        _given(run, recipe, recipe_file)
        if recipe_file
        else _found(run, recipe, root, options_of) or _copied(run, recipe, out)
    )
    mapping, notes = _spec(run, recipe, source, root, stored["verdicts"])
    write_text(out, _commented(yaml.write(mapping), notes, run))
    specs.load(out)
    return out


def _given(run: Run, recipe: Recipe, file: Path) -> Source:
    if load(file) != recipe:
        raise UsageError(f"{file} is not the recipe of {run.path}, or has changed since; run it again, or name another")
    return Source(folder=file.resolve().parent, config=file.name, overrides={})


def _found(
    run: Run, recipe: Recipe, root: Path, options_of: Callable[[list[str]], dict[str, Any] | None]
) -> Source | None:
    """The recipe that the run's command named, where it is still what was run."""
    manifest = run.manifest()
    words, folder = shlex.split(manifest.get("command", "")), Path(manifest.get("directory", "."))
    asked = options_of(words[1:]) if folder.is_dir() else None
    if asked is None:
        return None
    options = list(asked.get("overrides") or ())
    values = {key: yaml.scalar(value, key) for key, _, value in (text.partition("=") for text in options)}
    try:
        if asked.get("example"):
            config, place = f"{EXAMPLE_PREFIX}{asked['example']}", root  # no folder of the user's
            file = locate(None, None, asked["example"])
        else:
            file = locate(str(folder / (asked.get("recipe") or asked.get("config") or "")), None)
            config, place = file.name, file.resolve().parent
        same = load(file, options)
    except FinetuneError:
        return None
    if file.resolve().is_relative_to(run.path):  # `finetune export RUN`: what is in a run goes with it
        return None
    kept = same.model_copy(update={"output_dir": recipe.output_dir})  # an example's own is relative to where it is run
    return Source(folder=place, config=config, overrides=values) if kept == recipe else None


def _copied(run: Run, recipe: Recipe, out: Path) -> Source:
    """The stored recipe, beside the spec: its file is gone, has changed, or never was (`train quick`)."""
    folder = out.absolute().parent / "recipes"
    write_text(folder / f"{recipe.name}.yaml", dump(recipe))
    return Source(folder=folder, config=f"{recipe.name}.yaml", overrides={})


def _spec(
    run: Run, recipe: Recipe, source: Source, root: Path, found: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The spec's mapping, and what is to be said beside its keys."""
    trained = {name: report for name in ("train", "align") if (report := run.report(name)) is not None}
    notes: dict[str, str] = {}
    inside = source.folder.is_relative_to(root)
    folder = os.path.relpath(source.folder, root) if inside else str(source.folder)
    mapping: dict[str, Any] = {"test_id": recipe.name, "project_dir": folder, "config": source.config}
    own = {key: value for key, value in source.overrides.items() if key.partition(".")[0] not in OWN_KEYS}
    if own:
        mapping["dynamic_args"] = own
    if "export" in source.overrides:
        mapping["parity"] = source.overrides["export"]
    if "train" in trained:
        last = trained["train"].metrics["last_loss"]
        mapping["loss"] = {"final_max": _above(max(last, (last + LEAST_HEADROOM) / (1 + HEADROOM)), HEADROOM)}
        notes["final_max"] = f"measured {number(last)}, {HEADROOM:.0%} headroom, {LEAST_HEADROOM} at least"
        mapping["min_steps_logged"] = len(evidence.steps(run, "train"))
    asked = {key.partition(".")[2]: value for key, value in source.overrides.items() if key.startswith("expect.")}
    if expect := {**asked, **_expectations(recipe, found, notes)}:
        mapping["expect"] = expect
    else:
        mapping["checks"] = [check.name for check in CHECKS if check.wanted(recipe)]
    seconds = sum(report.seconds for report in reports(run))
    process = max((report.peak.get("process", 0) for report in trained.values()), default=0) / MIB
    mapping["bounds"] = {
        "seconds_max": _above(seconds, TIME_HEADROOM) + START_SECONDS,
        "process_mib_max": _above(process, HEADROOM),
    }
    notes["seconds_max"] = f"measured {number(seconds)}, {TIME_HEADROOM:.0%} headroom, {START_SECONDS} s to start"
    notes["process_mib_max"] = f"measured {number(process)}, {HEADROOM:.0%} headroom"
    mapping["gpu_requirement"] = 1 if any("device" in report.peak for report in trained.values()) else 0
    mapping["timeout"] = max(LEAST_TIMEOUT, math.ceil(TIMEOUT_FACTOR * seconds))
    return mapping, notes


def _expectations(recipe: Recipe, found: list[dict[str, Any]], notes: dict[str, str]) -> dict[str, float]:
    """The bounds of `expect` that the run's own numbers allow to be tighter than the recipe's."""
    recorded: dict[str, float] = {}
    for verdict in found:
        key = EXPECT_KEYS.get(verdict["name"])
        if key is None or verdict["name"] in _NOT_RECORDED or verdict["measured"] is None:
            continue
        measured, least = verdict["measured"], verdict["compare"] in (">", ">=")
        bound = _below(measured, HEADROOM) if least else _above(measured, HEADROOM)
        own = recorded.get(key, getattr(recipe.expect, key))
        # Two verdicts may share a key: the weaker of them decides.
        tighter = bound > own if least else bound < own
        if key in recorded:
            tighter = bound < own if least else bound > own
        if tighter:
            recorded[key] = bound
            notes[key] = f"measured {number(measured)} ({verdict['name']}), {HEADROOM:.0%} headroom"
    return recorded


def _above(value: float, share: float) -> float:
    """`value` and a share on top, rounded up to two digits."""
    return _rounded(value * (1 + share), math.ceil)


def _below(value: float, share: float) -> float:
    """`value` less a share, rounded down to two digits."""
    return _rounded(value * (1 - share), math.floor)


def _rounded(value: float, way: Any) -> float:
    if value <= 0:
        return value
    digits = 1 - math.floor(math.log10(value))
    return float(round(way(value * 10**digits) / 10**digits, max(0, digits)))


def _commented(text: str, notes: dict[str, str], run: Run) -> str:
    manifest = run.manifest()
    lines = [
        f"# Recorded from the run {run.path.name} of {manifest.get('time', '')[:10]}, finetune {manifest.get('finetune')},",
        f"# {manifest.get('cores')} cores, {manifest.get('cpu')}. Change a bound where you know better.",
    ]
    for line in text.splitlines():
        key = line.strip().partition(":")[0]
        lines.append(f"{line}  # {notes[key]}" if key in notes else line)
    return "\n".join(lines) + "\n"
