"""Fold the final adapter into the base model's weights: one directory that needs no PEFT."""

from __future__ import annotations

import shutil

from finetune import modelfiles
from finetune.backends import get
from finetune.errors import ResourceError, StageError
from finetune.memory import disk_free
from finetune.recipe import Recipe
from finetune.run import Run, evidence
from finetune.stages import Result


def run(recipe: Recipe, run: Run) -> Result:
    """Write `merge/model`: weights, config, tokenizer and the chat template of the training."""
    model, adapter = evidence.final(run, recipe)
    out = run.stage_dir("merge") / "model"
    modelfiles.check(model if adapter is None else adapter)
    size = sum(file.stat().st_size for file in model.glob("*") if file.is_file())
    if disk_free(run.path) < size * 1.1:
        raise ResourceError(f"merging needs {size * 1.1 / 2**30:.1f} GiB of disk at {run.path}; free some first")
    if adapter is not None:
        get(recipe.backend).merge(model, adapter, out, **evidence.model_settings(recipe))
    elif model.is_relative_to(run.path):
        shutil.rmtree(out, ignore_errors=True)
        # Not as links: two artifacts that are one file on the disk are damaged together, and none proves the other.
        shutil.copytree(model, out, copy_function=shutil.copyfile)
    else:
        raise StageError("there is nothing to merge: no adapter was trained in this run")
    return {"metrics": {"bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file())}, "artifacts": [out]}
