"""May this training go on from that checkpoint? Answered from the checkpoint's record, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.backends import Job, get
from finetune.core.console import say
from finetune.core.errors import Faults, FinetuneError, UsageError, first_line
from finetune.core.files import digest
from finetune.models import files as modelfiles
from finetune.run import Run, checkpoints, evidence, identity, seal
from finetune.run.identity import Adaptation, Differences, Past, Record, Training
from finetune.run.log import is_chained


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A checkpoint held against the training that would go on from it. `record` is None for one of an earlier version;
    `missing` names the files that are not there."""

    checkpoint: Path
    step: int
    record: Record | None
    training: Training
    missing: tuple[str, ...]
    differences: Differences

    @property
    def phrases(self) -> list[str]:
        """All that speaks against going on."""
        gone = [f"{self.checkpoint.name} has no {name}, so its {what} would start anew" for name, what in self._gone()]
        return [*gone, *self.differences.fixed, *self.differences.changed]

    def _gone(self) -> list[tuple[str, str]]:
        kinds = (("sched", "learning rate's schedule"), ("rng", "random state"))
        return [(name, next((what for sign, what in kinds if sign in name), "optimizer")) for name in self.missing]

    def refuse(self, *, changed: bool) -> None:
        """Raise Faults with every difference; with `changed`, only where nobody can go on."""
        hopeless = bool(self.missing or self.differences.fixed)
        if not (hopeless or (self.differences.changed and not changed)):
            return
        phrases = self.phrases
        ways = "start anew with --force" if hopeless else (
            "go on all the same with --resume --changed, or start anew with --force"
        )  # fmt: skip
        where = f"{self.checkpoint.name} is of another training" if self.differences else "it cannot be resumed"
        raise Faults(f"{where} ({self.checkpoint}); {ways}:", phrases)

    def past(self) -> Past:
        """What the training that goes on has behind it."""
        if self.record is None:
            planned = checkpoints.state(self.checkpoint).get("max_steps")
            first = ((0, planned),) if planned else ()
            return Past(plans=(*first, (self.step, None)), unexamined=(self.step,))
        before = self.record.past
        changed = tuple(f"from step {self.step}: {phrase}" for phrase in self.differences.changed)
        return before.model_copy(
            update={"plans": (*before.plans, (self.step, None)), "changed": (*before.changed, *changed)}
        )


def describe(job: Job, backend: str, run: Run) -> Training:
    """A job as plain data, with digests of the files that it names."""
    return Training(
        backend=backend,
        objective=job.objective,
        method=job.method,
        section="align" if job.objective == "dpo" else "train",
        options=json.loads(json.dumps(dict(job.options))),
        lora=json.loads(json.dumps(dict(job.lora))) if job.lora is not None and job.adapter is None else None,
        settings=dict(job.settings),
        rows=identity.of_rows(job.rows, f"prepare/{job.rows.name}"),
        eval_rows=identity.of_rows(job.eval_rows, f"prepare/{job.eval_rows.name}") if job.eval_rows else None,
        model=_digests(job.model, run),
        adapter=_digests(job.adapter, run) if job.adapter else None,
        chat_template=hashlib.sha256(job.chat_template.encode()).hexdigest() if job.chat_template else None,
    )


def hold(checkpoint: Path, job: Job, backend: str, run: Run) -> Resumption:
    """`job` against the training that `checkpoint` is of. Raises UsageError where that is not as it was written."""
    modelfiles.check_checkpoint(checkpoint)
    if damage := [*checkpoints.faults(checkpoint), *_not_as_left(checkpoint, run)]:
        raise UsageError(
            f"{checkpoint.name} is damaged ({', '.join(damage[:3])}): {checkpoint}. Resume from another checkpoint, or start "
            "anew with --force"
        )
    record, after = identity.read(checkpoint), describe(job, backend, run)
    wanted: tuple[str, ...] = getattr(get(backend), "checkpoint_files", ())
    return Resumption(
        checkpoint=checkpoint,
        step=checkpoints.state(checkpoint)["global_step"],
        record=record,
        training=after,
        missing=tuple(name for name in wanted if not _there(checkpoint, name)),
        differences=(
            identity.compare(record.training, after) if record else identity.compare_geometry(checkpoint, after)
        ),
    )


def _not_as_left(checkpoint: Path, run: Run) -> list[str]:
    """What the run itself knows better of a checkpoint in it: the files that its stage left, once that has ended; and that
    a training which seals its log leaves a record in each."""
    if not checkpoint.is_relative_to(run.path):
        return []
    name = checkpoint.relative_to(run.path).as_posix()
    try:
        report = run.report(Path(name).parts[0])
    except FinetuneError:  # damaged: the training goes on from its checkpoints, to have another
        report = None
    if report is not None and report.schema > 0:
        return [f"{found.file.removeprefix(f'{name}/')} {found.why}" for found in seal.changed(run, report, name)]
    alone = not (checkpoint / identity.FILE).is_file()
    return [f"{identity.FILE} is gone"] if alone and is_chained(run.log()[:1]) else []


def why_anew(checkpoint: Path, job: Job, backend: str, run: Run, *, same_inputs: bool) -> str:
    """Why a training that was stopped should not go on by itself from its checkpoint; empty where it should.

    `same_inputs`: whether the stage reads what it read then, which is all that is known of a checkpoint without a record.
    """
    try:
        found = hold(checkpoint, job, backend, run)
    except UsageError as error:
        return first_line(error)
    if found.record is None and not same_inputs:
        return "it is of an earlier version, and what the stage reads has changed"
    return ", ".join(found.phrases)


def begin(job: Job, backend: str, run: Run, stage: str, adapted: tuple[Adaptation, ...] = ()) -> Job:
    """The job with the record that its checkpoints shall hold, and adapted as that says: by `adapted`, or else as its
    checkpoint was. A resumed one is said and becomes an event; checkpoints after its own go, as the steps after it do."""
    if job.resume is None:
        return _recorded(job, describe(job, backend, run), Past(adaptations=adapted))
    found = hold(job.resume, job, backend, run)
    run.event(
        "resumed",
        stage=stage,
        checkpoint=str(found.checkpoint),
        step=found.step,
        examined=found.record is not None,
        changed=list(found.differences.changed),
        longer=found.differences.longer,
    )
    for sentence in [] if adapted else _sentences(found):  # which was said before it was tried again
        say(f"{stage}: {sentence}")
    for later in job.out.glob("checkpoint-*"):
        if checkpoints.step_of(later) > found.step:
            shutil.rmtree(later)
    past = found.past()
    return _recorded(job, found.training, past.model_copy(update={"adaptations": adapted or past.adaptations}))


def _recorded(job: Job, training: Training, past: Past) -> Job:
    return replace(job, identity=Record(training=training, past=past).text(), options=past.adapted(job.options))


def conclude(job: Job, facts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(what the whole training measured, its resumed parts included; what a report should say of it)."""
    begun = facts.get("resumed_from") or 0
    since = {"planned_steps": facts["steps"], **facts, "steps_watched": facts["steps"] - begun}
    past = Record.model_validate_json(identity.grown(job.identity, since)).past
    notes = [f"went on although this became another: {phrase}" for phrase in past.changed]
    notes += [
        f"went on from step {step} of an earlier version; whether it is the same is not known"
        for step in past.unexamined
    ]
    notes += [f"adapted to go on, {each.said()}" for each in past.adaptations]
    if len(past.plans) > 1:
        plans = ", ".join(f"{total} from step {step} on" for step, total in past.plans)
        notes.append(f"the number of steps planned was raised on the way: {plans}")
    return {**facts, **past.facts()}, notes


def _sentences(found: Resumption) -> list[str]:
    """What a user is told of a training that goes on."""
    if found.record is None:
        return [
            f"{found.checkpoint.name} is of an earlier version; whether it is of this same training cannot be examined"
        ]
    adapted = [f"going on as adapted {each.said()}" for each in found.past().adaptations[-1:]]
    differences = found.differences
    longer = [f"the same training goes on for longer ({differences.longer})"] if differences.longer else []
    return [*adapted, *longer, *(f"going on although this is another: {phrase}" for phrase in differences.changed)]


def _digests(directory: Path, run: Run) -> dict[str, str]:
    """Names and SHA-256 of what a model or adapter directory holds, as the stage that made it wrote them down."""
    found = evidence.fetched(run)
    for place, files in ((found["base"], found["files"]), (found["adapter"], found["adapter_files"])):
        if place and Path(place) == directory:
            return {name: facts["sha256"] for name, facts in files.items()}
    name = directory.relative_to(run.path).as_posix() if directory.is_relative_to(run.path) else str(directory)
    report = run.report(Path(name).parts[0])
    return {name: report.artifacts[name] if report and name in report.artifacts else digest(directory)}


def _there(checkpoint: Path, pattern: str) -> bool:
    """Whether a file of that pattern is in the folder, and not empty."""
    return any(file.stat().st_size for file in checkpoint.glob(pattern))
