"""What of a recipe's training options the mlx backend carries out; the rest is refused by name, never passed over."""

from __future__ import annotations

import math
from typing import Any

from finetune.backends import Job
from finetune.core.errors import Faults, UsageError

# Options that are not carried out here, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bf16": (False, None),
    "fp16": (False, None),
    "tf32": (None, False),
    "torch_compile": (False, None),
    "packing": (False, None),
    "loss_type": ("nll", None),
    "label_smoothing_factor": (0, 0.0, None),
    "neftune_noise_alpha": (None,),
    "early_stopping_patience": (None,),
    "dataloader_num_workers": (0, None),
    "report_to": ("none", None, []),
}
KNOWN: dict[str, tuple[str, ...]] = {
    "optim": ("adamw_torch", "adamw_torch_fused"),
}
INSTEAD = {"bf16": "set model.dtype: bfloat16", "fp16": "set model.dtype: float16"}


def chosen(job: Job) -> dict[str, Any]:
    """The job's options over the recipe's defaults. Raises UsageError with every one that cannot be carried out."""
    from finetune.recipe.sections import Optimization

    if job.objective != "sft":
        raise UsageError(
            f"the mlx backend has no {job.objective.upper()}; leave out 'align', or set 'backend: torch' for the recipe"
        )
    values = {**Optimization().model_dump(mode="json"), **job.options}
    faults = [
        f"train.{key}: the mlx backend has no {key}={values[key]!r}; {INSTEAD.get(key, 'leave it out')}"
        for key, neutral in UNSUPPORTED.items()
        if key in values and values[key] not in neutral
    ]
    faults += [
        f"train.{key}: '{values[key]}' is not in the mlx backend, which has: {', '.join(names)}"
        for key, names in KNOWN.items()
        if values[key] not in names
    ]
    if faults:
        raise Faults(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the recipe:", faults)
    return values


def total_steps(values: dict[str, Any], steps_per_epoch: int) -> int:
    if values["max_steps"] > 0:
        return int(values["max_steps"])
    return math.ceil(float(values["num_train_epochs"]) * steps_per_epoch)
