"""Do the log, the trainer's own log and the reports say the same, and is it what the files hold?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from finetune.checks import Verdict, judge
from finetune.checks.parts import Training, of_0_1, of_trainings, single
from finetune.checks.rows import labelled, rendering
from finetune.core.files import digest
from finetune.data import encode, sources
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.recipe.sections import Optimization
from finetune.run import Run, evidence, layout
from finetune.run.records.trained import Step
from finetune.run.records.whole import TrainMetrics

EVENTS = layout.EVENTS.path
LOGS = {"train": layout.TRAIN_LOGS, "align": layout.ALIGN_LOGS}
DRIFT = 1e-9  # relative, of a number computed twice in double precision
SECONDS = 5e-5  # by which the log rounds the seconds of a step; a report rounds a mean to milliseconds


@dataclass
class Numbers:
    """Numbers that are told, held against those that they must be; those that are not are collected."""

    off: list[str] = field(default_factory=list)
    count: int = 0

    def same(self, name: str, told: Any, found: Any) -> None:
        self.within(name, told, found, _is(told, found))

    def within(self, name: str, told: Any, found: Any, holds: bool) -> None:
        self.count += 1
        if not holds:
            self.off.append(f"{name} is told as {told} and is {found}")

    def verdict(self, name: str, place: str, of: str) -> Verdict:
        why = f"{self.count} numbers of {of}"
        if self.off:
            why = f"{self.off[0]}; {len(self.off)} of {self.count} numbers differ"
        return judge(name, len(self.off) if self.count else None, "==", 0, "numbers off", place, why)


def _is(told: Any, found: Any) -> bool:
    """Equal; numbers that are no numbers alike, and fractions but for rounding."""
    if isinstance(told, float) and isinstance(found, int | float):
        return math.isclose(told, found, rel_tol=DRIFT) or (math.isnan(told) and math.isnan(found))
    return bool(told == found)


# -- the steps of a training -------------------------------------------------------------------------------------------


def _log_as_trained(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """The steps in the log, against those that the trainer's stage wrote down when it was done, value by value."""
    logged, stored = training.steps(run), evidence.read(run, LOGS[training.stage])
    every, numbers = training.asked(recipe).logging_steps, Numbers()
    there = [step["step"] for step in logged]
    last = training.facts(run)["steps"]
    due = {1, *range(every, last + 1, every)}
    numbers.within("the order of steps", there, "1 upwards, each once", there == sorted(set(there)))
    lacking = sorted(due - set(there))
    numbers.within("the steps without an event", lacking[:5], "none", not lacking)
    numbers.within("the steps", there, f"{len(due)}, of {last} each {every}", set(there) <= set(range(1, last + 1)))
    numbers.same("the number of steps", len(logged), len(stored))
    for ours, theirs in zip(logged, stored, strict=False):
        for key in {**ours, **theirs}:
            numbers.within(
                f"{key} of step {ours['step']}", ours.get(key), theirs.get(key), _equal(ours.get(key), theirs.get(key))
            )
    name = f"{training.prefix}log_as_trained"
    return numbers.verdict(name, EVENTS, f"{len(logged)} steps, in {EVENTS} and in {LOGS[training.stage].path}")


def _equal(one: object, other: object) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return one == other or both_nan


def _report_as_logged(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """What the report says of a training, against its logged steps and what the recipe asks for."""
    asked, facts, steps, numbers = training.asked(recipe), training.facts(run), training.steps(run), Numbers()
    numbers.same("first_loss", facts["first_loss"], steps[0]["loss"])
    numbers.same("last_loss", facts["last_loss"], steps[-1]["loss"])
    numbers.same("tokens", facts["tokens"], sum(step["tokens"] for step in steps))
    numbers.same("trained_tokens", facts["trained_tokens"], sum(step["trained_tokens"] for step in steps))
    last = steps[-1]["step"]
    numbers.within("steps", facts["steps"], last, last <= facts["steps"] < last + asked.logging_steps)
    numbers.same("stopped", facts["stopped"], False)
    begun = run.events("training", stage=training.stage)
    numbers.same("resumed_from", facts["resumed_from"] or None, begun[-1]["resumed_from"] if begun else "not logged")
    planned = _planned(asked, _count(run, training), facts["world_size"], steps)
    if planned is not None:
        numbers.same("planned_steps", facts["planned_steps"], planned)
    if getattr(asked, "early_stopping_patience", None) is None:
        numbers.same("steps", facts["steps"], facts["planned_steps"])
    if not of_0_1(run, training):  # which did not tell of its parts
        _resumed(numbers, facts)
        numbers.same(
            "steps adapted at", [each["step"] for each in facts.get("adaptations", [])], _adapted(run, training)
        )
        numbers.within("device", facts.get("device"), "told", bool(facts.get("device")))
    _speed(numbers, facts, [step for step in steps if step["step"] > (facts["resumed_from"] or 0)])
    return numbers.verdict(
        f"{training.prefix}report_as_logged", training.report, f"{training.report}, as {EVENTS} has them"
    )


def _resumed(numbers: Numbers, facts: TrainMetrics) -> None:
    """What is told of the parts of a training that was resumed: all of its steps were watched, and the last plan is its."""
    untold = [key for key in ("steps_watched", "plans", "changed", "unexamined") if key not in facts]
    numbers.same("parts not told of", untold, [])
    plans = facts.get("plans") or [[0, 0]]
    numbers.same("the steps of the last plan", plans[-1][-1], facts["planned_steps"])
    if not facts.get("unexamined"):
        numbers.same("steps_watched", facts.get("steps_watched"), facts["steps"])


def _adapted(run: Run, training: Training) -> list[int]:
    """From which steps on a training went on otherwise than before, as the log has it. A checkpoint knows of what was done
    before it, so somebody who goes back further begins without it."""
    found: list[int] = []
    failed = False
    for event in run.events(stage=training.stage):
        if event["event"] == "stage_started":
            failed = False
        elif event["event"] == "bad_step":
            failed = event["done"] in ("shrink", "rollback")
        elif event["event"] == "training":
            begun = event["resumed_from"] or 0
            found = [*found, begun] if failed else [step for step in found if step < begun]
            failed = False
    return found


def _count(run: Run, training: Training) -> int:
    """How many prepared rows (or pairs) a training has."""
    if training.stage == "train":
        return len(evidence.rows(run, layout.TRAIN_ROWS))
    return len(evidence.rows(run, layout.PAIRS))


def _planned(asked: Optimization, rows: int, processes: int, steps: Sequence[Step]) -> int | None:
    """How many steps the recipe asks for; None where nobody here knows how many rows a step takes: packed ones, or those
    of several devices."""
    if asked.max_steps > 0:
        return asked.max_steps
    batch = asked.per_device_train_batch_size
    per_epoch = math.ceil(math.ceil(rows / batch) / asked.gradient_accumulation_steps)
    taken = min(rows, batch * asked.gradient_accumulation_steps)
    if processes != 1 or steps[0]["step"] != 1 or len(steps[0]["rows"]) != taken:
        return None
    return math.ceil(asked.num_train_epochs * per_epoch)


def _speed(numbers: Numbers, facts: TrainMetrics, steps: Sequence[Step]) -> None:
    """Tokens a second and seconds a step, against the seconds of the steps, as far as those were rounded."""
    taken, rounded = sum(step["seconds"] for step in steps), SECONDS * len(steps)
    count = max(1, facts["steps"] - (facts["resumed_from"] or 0))
    mean, room = taken / count, rounded / count + 10 * SECONDS
    told = facts["seconds_per_step"]
    numbers.within("seconds_per_step", told, round(mean, 3), abs(told - mean) <= room + DRIFT)
    speed, tokens = facts["tokens_per_second"], sum(step["tokens"] for step in steps)
    if speed is None or taken <= rounded:
        numbers.within("tokens_per_second", speed, "not known", taken <= rounded)
        return
    least, most = tokens / (taken + rounded) - 0.05, tokens / (taken - rounded) + 0.05
    numbers.within("tokens_per_second", speed, f"{least:.1f} to {most:.1f}", least <= speed <= most)


# -- what was prepared -------------------------------------------------------------------------------------------------


def _prepared_as_reported(recipe: Recipe, run: Run) -> Verdict:
    """What the report of `prepare` says of rows, pairs, template and tokenizer, against these."""
    told = cast(Mapping[str, Any], evidence.read(run, layout.PREPARED)["metrics"])
    tokenizer, template = rendering(recipe, run)
    numbers = Numbers()
    numbers.same(
        "the template in prepare/template.json", evidence.read(run, layout.TEMPLATE)["sha256"], template.digest
    )
    found: dict[str, Any] = {"template_sha256": template.digest, "vocab_size": tokenizer.vocab_size}
    if recipe.train is not None:
        found |= _of_rows(run, tokenizer)
    if recipe.train is not None and recipe.data is not None and recipe.data.on_overlong != "truncate":
        found["lost_answer_tokens"] = 0
    if recipe.align is not None:
        found["preference_rows"] = len(evidence.rows(run, layout.PAIRS))
    for name, value in found.items():
        numbers.same(name, told.get(name), value)
    listed = evidence.maybe(run, layout.SOURCES)  # version 0.1 kept none
    files = [str(path) for path in sources.local_files(recipe, "prepare")]
    if listed is not None:
        numbers.same("the data files", sorted(listed), sorted(files))
        for name in files:
            numbers.same(f"the SHA-256 of {name}", listed.get(name), digest(Path(name)))
    return numbers.verdict(
        "prepared_as_reported", layout.PREPARED.path, f"{layout.PREPARED.path}, as the files have them"
    )


def _of_rows(run: Run, tokenizer: Tokenizer) -> dict[str, float]:
    rows, held_out = evidence.rows(run, layout.TRAIN_ROWS), evidence.maybe_rows(run, layout.EVAL_ROWS)
    trained, lengths = [labelled(row) for row in rows], [len(row["input_ids"]) for row in rows]
    return {
        "rows": len(rows),
        "eval_rows": len(held_out),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "trained_tokens_min": min(trained, default=0),
        "longest_row": max(lengths, default=0),
        "unigram_entropy": encode.unigram_entropy([row["labels"] for row in rows]),
        "uniform_entropy": math.log(tokenizer.vocab_size),
    }


PARTS = (
    *of_trainings("log_as_trained", _log_as_trained, EVENTS),
    *of_trainings("report_as_logged", _report_as_logged),
    single("prepared_as_reported", _prepared_as_reported, layout.PREPARED.path, lambda recipe: True),
)
