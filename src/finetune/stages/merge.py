"""Fold the final adapter into the base model's weights: one directory that needs no PEFT."""

from __future__ import annotations

import shutil

from finetune.backends import get
from finetune.core.errors import StageError
from finetune.core.files import aside
from finetune.core.memory import need_disk
from finetune.export import sizes
from finetune.models import files
from finetune.recipe import Recipe
from finetune.run import Run, evidence
from finetune.stages import Result


def run(recipe: Recipe, run: Run) -> Result:
    """Write `merge/model`: weights, config, tokenizer and the chat template of the training."""
    model, adapter = evidence.final(run, recipe)
    out = run.stage_dir("merge") / "model"
    files.check(model if adapter is None else adapter)
    need_disk(
        run.path, sizes.merged(model, recipe.model.dtype), "the merged model", "choose another disk with --run DIR"
    )
    if adapter is not None:
        get(recipe.backend).merge(model, adapter, out, **evidence.model_settings(recipe))
    elif model.is_relative_to(run.path):
        with aside(out) as partial:
            # Not as links: two artifacts that are one file on the disk are damaged together, and none proves the other.
            shutil.copytree(model, partial, copy_function=shutil.copyfile)
    else:
        raise StageError("there is nothing to merge: no adapter was trained in this run")
    return {"metrics": {"bytes": sizes.stored(out)}, "artifacts": [out]}
