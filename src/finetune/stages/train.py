"""Supervised fine-tuning of the fetched model on the prepared rows."""

from __future__ import annotations

from pathlib import Path

from finetune import evidence
from finetune.backends import Job
from finetune.errors import StageError
from finetune.estimate import check_resources
from finetune.recipe import Recipe
from finetune.run import Run
from finetune.stages import Result
from finetune.stages.training import clear, execute_job, job_options


def run(recipe: Recipe, run: Run) -> Result:
    """Write `train/adapter` (LoRA) or `train/model` (full), checkpoints, `train/initial`, `train/trainer_logs.json`."""
    train = recipe.train
    if train is None:
        raise StageError("the recipe has no 'train' section")
    job = sft_job(recipe, run, run.stage_dir("train"))
    check_resources(recipe, run)
    if run.resume is None:
        clear(job.out)
    return execute_job(job, recipe, run, "train")


def sft_job(recipe: Recipe, run: Run, out: Path) -> Job:
    """The job that this recipe asks for, writing to `out`."""
    train = recipe.train
    assert train is not None
    found = evidence.fetched(run)
    held_out = run.path / "prepare" / "eval.jsonl"
    return Job(
        objective="sft",
        method=train.method,
        model=Path(found["base"]),
        adapter=Path(found["adapter"]) if found["adapter"] and train.method == "lora" else None,
        out=out,
        rows=evidence.required(run, "prepare/train.jsonl", "prepare"),
        eval_rows=held_out if held_out.is_file() else None,
        options=job_options(train),
        lora=train.lora.model_dump(mode="json") if train.method == "lora" else None,
        resume=run.resume,
        chat_template=(run.path / "prepare" / "chat_template.jinja").read_text(encoding="utf-8"),
        settings=evidence.model_settings(recipe),
    )
