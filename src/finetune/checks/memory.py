"""Does LoRA save memory against full fine-tuning? Both were measured, each in a process of its own."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Literal

from finetune.checks import Part, Verdict, judge, missing
from finetune.checks.parts import SFT
from finetune.core.arithmetic import DTYPE_BYTES
from finetune.experiments import MEMORY_STEPS
from finetune.recipe import Recipe
from finetune.recipe.quantizers import quantizer
from finetune.run import Run, evidence, layout
from finetune.run.records.measured import Memory, MemorySide

MEASURED = layout.MEMORY.path
SIDES: tuple[Literal["lora", "full"], ...] = ("lora", "full")
ESTIMATE_TOLERANCE = 0.1
STORED_TOLERANCE = 0.01  # an unused or shared weight; an optimizer's state is compared to the byte
MIB = 2**20


def _check(recipe: Recipe, run: Run) -> list[Verdict]:
    found = evidence.read(run, layout.MEMORY)
    return [
        _same_work(recipe, run, found),
        _as_stored(recipe, run, found),
        _efficiency(recipe, found),
        _as_estimated(found),
    ]


def _efficiency(recipe: Recipe, found: Memory) -> Verdict:
    name, unit, bound = "memory_efficiency", "less training state", recipe.expect.memory_reduction_min
    assert bound is not None
    lora, full = found["lora"], found["full"]
    if not all(side["training_state_bytes"] > 0 and side["peak_process_bytes"] > 0 for side in (lora, full)):
        return missing(name, ">", bound, unit, MEASURED, "a size that is not positive")
    state = reduction(full["training_state_bytes"], lora["training_state_bytes"])
    peak = reduction(full["peak_process_bytes"], lora["peak_process_bytes"])
    shape = f"{found['batch_size']} x {found['tokens_per_row']} tokens, {found['dtype']}"
    return judge(
        name, state, ">", bound, unit, MEASURED,
        f"weights, gradients and optimizer at {shape}: {full['training_state_bytes'] / MIB:.0f} MiB full, "
        f"{lora['training_state_bytes'] / MIB:.0f} MiB LoRA; process peak {full['peak_process_bytes'] / MIB:.0f} and "
        f"{lora['peak_process_bytes'] / MIB:.0f} MiB ({peak:.0%} less)",
    )  # fmt: skip


def _as_estimated(found: Memory) -> Verdict:
    measured, estimated = found["lora"]["training_state_bytes"], found["lora"]["estimated"]["training_state"]
    why = f"estimated {estimated / MIB:.0f} MiB of LoRA training state, measured {measured / MIB:.0f} MiB"
    apart = abs(estimated - measured) / measured if measured else None
    return judge("memory_as_estimated", apart, "<=", ESTIMATE_TOLERANCE, "relative distance", MEASURED, why)


def _same_work(recipe: Recipe, run: Run, found: Memory) -> Verdict:
    """Both trained, and the same: step by step as many tokens, in all those of the longest rows; and had losses."""
    name, unit = "memory_same_work", "tokens apart"
    tokens, losses = ({side: found[side][part] for side in SIDES} for part in ("tokens", "losses"))
    if not all(losses[side] and all(map(math.isfinite, losses[side])) for side in SIDES):
        return missing(name, "==", 0, unit, MEASURED, f"not every step of both trainings has a loss: {losses}")
    if any(len(losses[side]) != len(tokens[side]) for side in SIDES):
        return missing(name, "==", 0, unit, MEASURED, f"as many losses as steps are wanted: {losses} of {tokens}")
    if why := _of_other_rows(recipe, run, found):
        return missing(name, "==", 0, unit, MEASURED, why)
    apart = sum(abs(one - other) for one, other in zip_longest(*tokens.values(), fillvalue=0))
    if recipe.train is None or not recipe.train.packing:  # packed, a step holds other rows
        apart += abs(sum(tokens["full"]) - found["tokens"])
    why = f"{len(tokens['full'])} steps on {sum(tokens['full'])} tokens of the longest rows in both trainings"
    if apart:
        why = f"LoRA took {tokens['lora']} tokens a step, full fine-tuning {tokens['full']}, and the longest rows have "
        why += f"{found['tokens']} in all: what the two need cannot be compared"
    return judge(name, apart, "==", 0, unit, MEASURED, why)


def _of_other_rows(recipe: Recipe, run: Run, found: Memory) -> str:
    """Why the shape that was measured is not that of the recipe's longest rows; empty where it is."""
    assert recipe.train is not None
    batch = recipe.train.per_device_train_batch_size
    lengths = sorted((len(row["input_ids"]) for row in evidence.rows(run, layout.TRAIN_ROWS)), reverse=True)[:batch]
    rounds = MEMORY_STEPS if len(lengths) == batch else MEMORY_STEPS**2
    wanted = (batch, max(lengths, default=0), recipe.model.dtype, rounds * sum(lengths))
    measured = (found["batch_size"], found["tokens_per_row"], found["dtype"], found["tokens"])
    if wanted == measured:
        return ""
    shape = "{} rows of up to {} tokens in {}, {} in all".format
    return f"measured were {shape(*measured)}; the recipe's longest are {shape(*wanted)}"


def _as_stored(recipe: Recipe, run: Run, found: Memory) -> Verdict:
    """What was in memory is what the run has on disk: weights, a gradient for each trained one, the optimizer's state; but
    for weights that a quantizer held, which take its bits."""
    stored, lora, full = found["stored"], found["lora"], found["full"]
    base, adapter = stored["base"], stored["adapter"]
    below = base
    if recipe.model.quantization:
        count, row = SFT.facts(run).get("quantized_parameters", 0), quantizer(recipe.model.quantization)
        below -= int(count * (DTYPE_BYTES[recipe.model.dtype] - row.bits / 8))
    expected = {
        "LoRA's weights": (lora["weight_bytes"], below + adapter, STORED_TOLERANCE),
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
    sums = {"LoRA": lora, "full fine-tuning": full}
    unsummed = [part for part, side in sums.items() if side["training_state_bytes"] != _state(side)]
    if unsummed and not odd:
        side = sums[unsummed[0]]
        why = f"{unsummed[0]}: weights, gradients and optimizer are {_state(side):,} bytes, and not, as it says, "
        why += f"{side['training_state_bytes']:,}"
    return judge("memory_as_stored", len(odd) + len(unsummed), "==", 0, "parts apart", MEASURED, why)


def _state(side: MemorySide) -> int:
    return side["weight_bytes"] + side["gradient_bytes"] + side["optimizer_bytes"]


def reduction(full: float, lora: float) -> float:
    """How much less LoRA needs, as a share of full fine-tuning's bytes."""
    return (full - lora) / full


PARTS: tuple[Part, ...] = (
    Part(
        check=_check,
        owes=lambda recipe: ("memory_same_work", "memory_as_stored", "memory_efficiency", "memory_as_estimated"),
        evidence=MEASURED,
    ),
)
