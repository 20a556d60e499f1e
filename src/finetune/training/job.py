"""What trainings share: make a job, run it, write its events, survive an interruption, publish."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.backends import Job, Step, get
from finetune.backends.failing import StepError, is_out_of_memory, not_finite
from finetune.core.console import progress, say
from finetune.core.errors import FinetuneError, Interrupted, StageError, UsageError
from finetune.core.files import copy
from finetune.core.memory import need_disk
from finetune.core.signals import stop_requests
from finetune.recipe import Recipe, trackers
from finetune.recipe.sections import Lora, Optimization
from finetune.run import Run, checkpoints, evidence, layout
from finetune.run.identity import Adaptation
from finetune.training import recovery, resuming

TRACKER_FAILED = "tracker_failed"  # the event of a tracker that failed for good
# How torch (whose zip writer knows no errno) and safetensors say that a file could not be written.
UNWRITTEN = ("inline_container", "pytorchstreamwriter", "no space left", "file too large", "os error 28")


def clear(directory: Path) -> None:
    """Empty a stage's directory before a training that starts anew, so that nothing old can be read as new."""
    if gone := checkpoints.stored(directory):
        say(
            f"{directory.name}: the checkpoints of the training before are deleted ({', '.join(each.name for each in gone)})"
        )
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def execute_job(job: Job, recipe: Recipe, run: Run, stage: str) -> dict[str, Any]:
    """Run a training to its end. Every step becomes an event; returns the stage's result.

    Ctrl-C saves a checkpoint and raises Interrupted with the command that resumes. A step that cannot be taken ends it, or
    it goes on otherwise, as the recipe says (see `finetune.training.recovery`).
    """
    _check_publishing(recipe, stage)
    job = replace(job, name=recipe.name if stage == "train" else f"{recipe.name}-{stage}")
    adapted: tuple[Adaptation, ...] = ()
    while True:
        trying = resuming.begin(job, recipe.backend, run, stage, adapted)
        begun = checkpoints.state(job.resume)["global_step"] if job.resume else 0
        run.event("training", stage=stage, resumed_from=begun or None, objective=job.objective, method=job.method)
        try:
            facts, spent = _followed(trying, recipe, run, stage)
            break
        except StepError as error:
            newest = checkpoints.newest_whole(checkpoints.stored(job.out), lambda folder, faults: None)
            job = replace(job, resume=newest or job.resume)
            adapted = recovery.adapted(error, replace(trying, resume=job.resume))
            done = adapted[-1].kind if adapted else "stop"
            run.event("bad_step", stage=stage, step=error.step, rows=list(error.rows), what=error.what, done=done)
            if not adapted:
                raise recovery.ended(error, trying, evidence.steps(run, stage)) from error
            say(f"{stage}: {error}; going on {adapted[-1].said()}")
        gc.collect()  # the training that failed, whose memory the next one needs
    for failure in facts.pop("trackers", ()):
        run.event(TRACKER_FAILED, stage=stage, **failure)
    if facts["stopped"]:
        raise Interrupted(_resume_hint(job.out, run, stage))
    facts, notes = resuming.conclude(trying, facts)
    taken = evidence.steps(run, stage)
    if not taken:
        raise StageError(f"the stage '{stage}' ended without a single logged step; see {run.events_path}")
    logs = evidence.write(run, layout.TRAIN_LOGS if stage == "train" else layout.ALIGN_LOGS, taken)
    result = job.out / ("adapter" if job.method == "lora" else "model")
    _publish(job.out, result, recipe, stage)
    peak = {"device": facts.pop("device_peak_bytes")} if "device_peak_bytes" in facts else {}
    if skipped := sum(each.get("skipped", 0) for each in taken):
        notes.append(
            f"{skipped} of {facts['steps']} steps were skipped, since their loss or gradient was no finite number"
        )
    return {
        "metrics": {
            **facts,
            "first_loss": taken[0]["loss"],
            "last_loss": taken[-1]["loss"],
            "tokens": sum(s["tokens"] for s in taken),
            "trained_tokens": sum(s["trained_tokens"] for s in taken),
            "tokens_per_second": round(spent.tokens / spent.seconds, 1) if spent.seconds else None,
            "seconds_per_step": round(spent.seconds / max(1, facts["steps"] - begun), 3),
        },
        "artifacts": [result, logs, *[p for p in [job.out / "initial"] if p.is_dir()]],
        "peak": peak,
        "notes": [*notes, *_of_trackers(run, stage)],
    }


@dataclass
class Spent:
    """What steps took."""

    tokens: int = 0
    seconds: float = 0.0


def _followed(job: Job, recipe: Recipe, run: Run, stage: str) -> tuple[dict[str, Any], Spent]:
    """Train, every step an event as it happens; returns the backend's facts, and what its steps took."""
    bar, spent = None, Spent()
    with ExitStack() as stack:
        stream = get(recipe.backend).train(replace(job, should_stop=stack.enter_context(stop_requests())))
        try:
            while True:
                try:
                    step = next(stream)
                except StopIteration as end:
                    return end.value, spent
                spent.tokens, spent.seconds = spent.tokens + step.tokens, spent.seconds + step.seconds
                run.event("step", stage=stage, **_event(step))
                if step.skipped:
                    what = not_finite(step.loss, step.grad_norm) or "of one of its steps loss or gradient is not finite"
                    run.event("bad_step", stage=stage, step=step.step, rows=list(step.rows), what=what, done="skip")
                    say(f"{stage}: step {step.step} was skipped: {what}")
                if bar is None:
                    bar = stack.enter_context(progress(step.total, stage))
                speed = step.tokens / step.seconds if step.seconds else 0.0
                bar.update(step.step, loss=step.loss, tokens_per_second=speed)
        except FinetuneError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise StageError(f"out of memory while training. {recovery.less_memory(stage)}") from error
            if any(sign in str(error).lower() for sign in UNWRITTEN):
                raise StageError(
                    f"writing a checkpoint into {job.out} failed, most likely because the disk is full. Free some space, "
                    "or choose another disk with --run DIR, or save less often (save_steps)"
                ) from error
            raise


def _event(step: Step) -> dict[str, Any]:
    """What the log tells of a step."""
    return {
        "step": step.step,
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "seconds": round(step.seconds, 4),
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        "epoch": step.epoch,
        "rows": list(step.rows),
        **({"skipped": step.skipped} if step.skipped else {}),
        **step.extra,
    }


def job_of(stage: str, recipe: Recipe, run: Run) -> Job:
    """The job that the stage `train` or `align` carries out."""
    return (sft_job if stage == "train" else dpo_job)(recipe, run, run.path / stage)


def sft_job(recipe: Recipe, run: Run, out: Path) -> Job:
    """The job that this recipe asks for, writing to `out`."""
    train = recipe.train
    assert train is not None
    found = evidence.fetched(run)
    if found["adapter"] and train.method == "full":
        raise UsageError(
            f"model.path {found['path']} is an adapter, and 'train.method: full' would leave it out. Use 'lora', or "
            "merge it first (finetune merge) and name the merged model"
        )
    held_out = run.path / layout.EVAL_ROWS.path
    return Job(
        objective="sft",
        method=train.method,
        model=Path(found["base"]),
        adapter=Path(found["adapter"]) if found["adapter"] else None,
        out=out,
        rows=evidence.required(run, layout.TRAIN_ROWS),
        eval_rows=held_out if held_out.is_file() else None,
        options=job_options(train),
        lora=train.lora.model_dump(mode="json") if train.method == "lora" else None,
        resume=run.resume,
        chat_template=evidence.chat_template(run),
        settings=evidence.model_settings(recipe),
    )


def dpo_job(recipe: Recipe, run: Run, out: Path) -> Job:
    """The alignment that this recipe asks for: of the trained model, or of the fetched one where nothing is trained."""
    assert recipe.align is not None
    before = evidence.phases(run, recipe.model_copy(update={"align": None}))  # its own report may be damaged
    base, adapter = before.get("trained") or before["base"]
    method = recipe.train.method if recipe.train else "lora"
    lora = recipe.train.lora if recipe.train else Lora()
    return Job(
        objective="dpo",
        method=method,
        model=base,
        adapter=adapter,
        out=out,
        rows=evidence.required(run, layout.PAIRS),
        options=job_options(recipe.align),
        lora=lora.model_dump(mode="json") if method == "lora" else None,
        resume=run.resume,
        chat_template=evidence.chat_template(run),
        settings=evidence.model_settings(recipe),
    )


def job_options(section: Optimization) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude={"lora", "data", "output_dir", "method"})


def _of_trackers(run: Run, stage: str) -> list[str]:
    """What is to be said of the trackers of a training, its resumed parts included."""
    found: list[str] = []
    for event in run.events(stage=stage):
        if event["event"] == "training" and not event["resumed_from"]:
            found.clear()
        elif event["event"] == TRACKER_FAILED:
            found.append(trackers.sentence(event))
    return found


def _check_publishing(recipe: Recipe, stage: str) -> None:
    """A place that cannot be written to must be known before the training, not after it."""
    section = recipe.train if stage == "train" else recipe.align
    if section is None or not section.output_dir:
        return
    target = Path(section.output_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{stage}.output_dir: {target} cannot be made: {error.strerror}. Name another") from None
    if not os.access(target, os.W_OK):
        raise UsageError(f"{stage}.output_dir: {target} cannot be written to. Name another")


def _publish(out: Path, result: Path, recipe: Recipe, stage: str) -> None:
    section = recipe.train if stage == "train" else recipe.align
    target = Path(section.output_dir) if section and section.output_dir else None
    if target is None:
        return
    target.mkdir(parents=True, exist_ok=True)
    folders = {result: target, **{each: target / each.name for each in checkpoints.stored(out)}}
    needed = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    need_disk(target, needed, f"what goes to {stage}.output_dir", "name another")
    for folder, place in folders.items():
        shutil.copytree(folder, place, dirs_exist_ok=True, copy_function=copy)
    say(f"published to {target}")


def _resume_hint(out: Path, run: Run, stage: str) -> str:
    """The stored recipe is named: it holds what --set changed, and `train quick` has no other."""
    here = Path(os.path.relpath(run.path)) if run.path.is_relative_to(Path.cwd()) else run.path
    again = f"finetune {stage} {shlex.quote(str(here / 'recipe.yaml'))} --run {shlex.quote(str(here))} --resume"
    return f"interrupted; saved {checkpoints.stored(out)[-1].name} in {out}. Go on with: {again}"
