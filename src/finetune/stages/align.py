"""Preference alignment (DPO) of the trained model, or of the fetched one when the recipe trains nothing before."""

from __future__ import annotations

from finetune import evidence
from finetune.backends import Job
from finetune.errors import StageError
from finetune.recipe import Recipe
from finetune.recipe.sections import Lora
from finetune.run import Run
from finetune.stages import Result
from finetune.training import clear, execute_job, job_options


def run(recipe: Recipe, run: Run) -> Result:
    """Write `align/adapter` (or `align/model`), checkpoints and `align/trainer_logs.json`."""
    align = recipe.align
    if align is None:
        raise StageError("the recipe has no 'align' section")
    base, adapter = evidence.phases(run, recipe).get("trained") or evidence.phases(run, recipe)["base"]
    method = recipe.train.method if recipe.train else "lora"
    lora = recipe.train.lora if recipe.train else Lora()
    out = run.stage_dir("align")
    if run.resume is None:
        clear(out)
    job = Job(
        objective="dpo",
        method=method,
        model=base,
        adapter=adapter,
        out=out,
        rows=evidence.required(run, "prepare/preferences.jsonl", "prepare"),
        options=job_options(align),
        lora=lora.model_dump(mode="json") if method == "lora" else None,
        resume=run.resume,
        chat_template=(run.path / "prepare" / "chat_template.jinja").read_text(encoding="utf-8"),
        settings=evidence.model_settings(recipe),
    )
    return execute_job(job, recipe, run, "align")
