"""Does LoRA save memory against full fine-tuning? Both were measured, each in a process of its own."""

from __future__ import annotations

import json
import math
from itertools import zip_longest
from typing import Any

from finetune.checks import Verdict, judge, missing
from finetune.recipe import Recipe
from finetune.run import Run

MEASURED = "measure/memory.json"
SIDES = ("lora", "full")
ESTIMATE_TOLERANCE = 0.1
STORED_TOLERANCE = 0.01  # an unused or shared weight; an optimizer's state is compared to the byte
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
        _same_work(recipe, found),
        _as_stored(found),
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


def _same_work(recipe: Recipe, found: dict[str, Any]) -> Verdict:
    """Both trained, and the same: step by step as many tokens, in all those of the longest rows; and had losses."""
    name, unit = "memory_same_work", "tokens apart"
    tokens, losses = ({side: found[side].get(part, []) for side in SIDES} for part in ("tokens", "losses"))
    if not all(losses[side] and all(map(math.isfinite, losses[side])) for side in SIDES):
        return missing(name, "==", 0, unit, MEASURED, f"not every step of both trainings has a loss: {losses}")
    apart = sum(abs(one - other) for one, other in zip_longest(*tokens.values(), fillvalue=0))
    if recipe.train is None or not recipe.train.packing:  # packed, a step holds other rows
        apart += abs(sum(tokens["full"]) - found.get("tokens", 0))
    why = f"{len(tokens['full'])} steps on {sum(tokens['full'])} tokens of the longest rows in both trainings"
    if apart:
        why = f"LoRA took {tokens['lora']} tokens a step, full fine-tuning {tokens['full']}, and the longest rows have "
        why += f"{found.get('tokens')} in all: what the two need cannot be compared"
    return judge(name, apart, "==", 0, unit, MEASURED, why)


def _as_stored(found: dict[str, Any]) -> Verdict:
    """What was in memory is what the run has on disk: weights, a gradient for each trained one, the optimizer's state."""
    name, unit = "memory_as_stored", "parts apart"
    stored, lora, full = found.get("stored"), found["lora"], found["full"]
    if stored is None:
        return missing(name, "==", 0, unit, MEASURED, "nobody looked at what is on disk; measure again")
    base, adapter = stored["base"], stored["adapter"]
    expected = {
        "LoRA's weights": (lora["weight_bytes"], base + adapter, STORED_TOLERANCE),
        "LoRA's gradients": (lora["gradient_bytes"], adapter, STORED_TOLERANCE),
        "full fine-tuning's weights": (full["weight_bytes"], base, STORED_TOLERANCE),
        "full fine-tuning's gradients": (full["gradient_bytes"], base, STORED_TOLERANCE),
    }
    if stored["optimizer"] is not None:
        expected["LoRA's optimizer state"] = (lora["optimizer_bytes"], stored["optimizer"], 0.0)
    odd = {
        part: (measured, there)
        for part, (measured, there, tolerance) in expected.items()
        if not abs(measured - there) <= tolerance * there
    }
    why = f"{', '.join(expected)}: as many bytes as the run's model, adapter and checkpoint have on disk"
    if odd:
        part, (measured, there) = next(iter(odd.items()))
        why = f"{part}: {measured:,.0f} bytes in memory, {there:,} on disk; these are not numbers of this training"
    return judge(name, len(odd), "==", 0, unit, MEASURED, why)


def reduction(full: float, lora: float) -> float:
    """How much less LoRA needs, as a share of full fine-tuning's bytes."""
    return (full - lora) / full
