"""Supervised fine-tuning of the fetched model on the prepared rows."""

from __future__ import annotations

from finetune.core.console import say
from finetune.core.errors import StageError
from finetune.recipe import Recipe
from finetune.run import Run
from finetune.stages import Result
from finetune.training.estimate import check_resources
from finetune.training.job import clear, execute_job, sft_job


def run(recipe: Recipe, run: Run) -> Result:
    """Write `train/adapter` (LoRA) or `train/model` (full), checkpoints, `train/initial`, `train/trainer_logs.json`."""
    train = recipe.train
    if train is None:
        raise StageError("the recipe has no 'train' section")
    job = sft_job(recipe, run, run.stage_dir("train"))
    check_resources(recipe, run)
    if run.resume is None:
        clear(job.out)
    result = execute_job(job, recipe, run, "train")
    if job.adapter is not None and "lora" in train.model_fields_set:
        note = f"went on training the adapter {job.adapter} with its own settings; train.lora was not used"
        say(f"note: {note}")
        result["notes"].append(note)
    return result
