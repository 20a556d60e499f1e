"""Does LoRA save memory against full fine-tuning? Both were measured, each in a process of its own."""

from __future__ import annotations

import json

from finetune.checks import Verdict, judge, missing
from finetune.recipe import Recipe
from finetune.run import Run

MEASURED = "measure/memory.json"
ESTIMATE_TOLERANCE = 0.1
MIB = 2**20


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    bound = recipe.expect.memory_reduction_min
    assert bound is not None
    path = run.path / MEASURED
    if not path.is_file():
        return [missing("memory_efficiency", ">", bound, "less training state", MEASURED, "nothing was measured")]
    found = json.loads(path.read_text(encoding="utf-8"))
    lora, full = found["lora"], found["full"]
    if not all(side[key] > 0 for side in (lora, full) for key in ("training_state_bytes", "peak_process_bytes")):
        return [
            missing("memory_efficiency", ">", bound, "less training state", MEASURED, "a size that is not positive")
        ]
    state = reduction(full["training_state_bytes"], lora["training_state_bytes"])
    peak = reduction(full["peak_process_bytes"], lora["peak_process_bytes"])
    shape = f"{found['batch_size']} x {found['tokens_per_row']} tokens, {found['dtype']}"
    measured, estimated = lora["training_state_bytes"], lora["estimated"]["training_state"]
    return [
        judge(
            "memory_efficiency", state, ">", bound, "less training state", MEASURED,
            f"weights, gradients and optimizer at {shape}: {full['training_state_bytes'] / MIB:.0f} MiB full, "
            f"{measured / MIB:.0f} MiB LoRA; process peak {full['peak_process_bytes'] / MIB:.0f} and "
            f"{lora['peak_process_bytes'] / MIB:.0f} MiB ({peak:.0%} less)",
        ),
        judge(
            "memory_as_estimated", abs(estimated - measured) / measured, "<=", ESTIMATE_TOLERANCE, "relative distance",
            MEASURED, f"estimated {estimated / MIB:.0f} MiB of LoRA training state, measured {measured / MIB:.0f} MiB",
        ),
    ]  # fmt: skip


def reduction(full: float, lora: float) -> float:
    """How much less LoRA needs, as a share of full fine-tuning's bytes."""
    return (full - lora) / full
