"""Preference alignment (DPO) of the trained model, or of the fetched one when the recipe trains nothing before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from finetune.backends import Job, get
from finetune.core.errors import StageError
from finetune.recipe import Recipe
from finetune.run import Run, checkpoints, evidence, layout
from finetune.run.records import trained
from finetune.stages import Result
from finetune.training.job import clear, dpo_job, execute_job


def run(recipe: Recipe, run: Run) -> Result:
    """Write `align/adapter` (or `align/model`), checkpoints, `align/trainer_logs.json` and `align/rewards.json`."""
    if recipe.align is None:
        raise StageError("the recipe has no 'align' section")
    job = dpo_job(recipe, run, run.stage_dir("align"))
    if run.resume is None:
        clear(job.out)
    result = execute_job(job, recipe, run, "align")
    stored = checkpoints.stored(job.out)
    if stored and checkpoints.step_of(stored[-1]) == result["metrics"]["steps"]:
        result["artifacts"] += _one_more_step(recipe, run, job, stored[-1])
    return result


def _one_more_step(recipe: Recipe, run: Run, job: Job, last: Path) -> list[Path]:
    """Go on from the last checkpoint for one step, and note what the trainer says before it moves anything.

    That is its own account of the aligned model: loss and rewards, by its reference and its beta.
    """
    step, work = checkpoints.step_of(last) + 1, job.out / "one-more-step"
    once = {"max_steps": step, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    options = {**job.options, **once, "eval_strategy": "no", "report_to": "none"}
    steps = list(get(recipe.backend).train(replace(job, out=work, resume=last, options=options)))
    shutil.rmtree(work, ignore_errors=True)
    if not steps:
        return []  # the check misses it
    said = steps[0]
    account: trained.Account = {
        "step": said.step,
        "rows": list(said.rows),
        "loss": said.loss,
        "chosen": said.extra.get("rewards/chosen"),
        "rejected": said.extra.get("rewards/rejected"),
    }
    return [evidence.write(run, layout.REWARDS, account)]
