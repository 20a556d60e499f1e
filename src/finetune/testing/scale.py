"""How large a real-model test this machine can bear."""

from __future__ import annotations

import os
from dataclasses import dataclass

from finetune.core.memory import available

GIB = 2**30
FLOOR = 3 * GIB  # the embedded model, trained with LoRA in float32, peaks at 2.5 GB


@dataclass(frozen=True, kw_only=True)
class Scale:
    """`model` as a recipe names it; batch and accumulation keep their product, so a step sees the same rows."""

    model: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    why: str


def choose(memory: int | None = None) -> Scale | None:
    """The scale for this much free memory (measured when None), or None below the floor.

    FT_TEST_MODEL, then FT_E2E_MODEL_ID, name another model than the embedded one.
    """
    memory = available() if memory is None else memory
    if memory < FLOOR:
        return None
    model = os.environ.get("FT_TEST_MODEL") or os.environ.get("FT_E2E_MODEL_ID") or "smollm2-135m"
    batch, steps = (6, 1) if memory >= 8 * GIB else (3, 2) if memory >= 4 * GIB else (1, 6)
    why = f"{memory / GIB:.1f} GiB free, {os.cpu_count()} cores: {model}, batch {batch} x {steps}"
    return Scale(model=model, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, why=why)
