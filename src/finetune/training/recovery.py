"""What becomes of a training whose step cannot be taken: it goes on otherwise, as `on_oom` and `on_nan` ask, or ends with
what happened, in which rows, and whose fault it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.backends import Job
from finetune.backends.failing import NoMemoryError, NotFiniteError, StepError
from finetune.core.errors import StageError
from finetune.run import checkpoints
from finetune.run.identity import Adaptation, Record
from finetune.run.records.trained import Step

ROLLBACKS = 3  # of one training; what is no number at an eighth of the learning rate is no matter of the rate
RISE = 2.0  # times the lowest loss: a training that came to this before it broke was diverging
NAMED = 4  # rows that an error tells of
FLOAT16_LARGEST = 65_504
GOING_ON = "The same command goes on from there"


def adapted(error: StepError, job: Job) -> tuple[Adaptation, ...]:
    """All that the job, which is as it was tried last, does otherwise from `job.resume` on; empty where it does not go on."""
    done = Record.model_validate_json(job.identity).past.adaptations
    asked, step = job.options, checkpoints.state(job.resume)["global_step"] if job.resume else 0
    share = done[-1].learning_rate_share if done else 1.0
    batch, accumulation = asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"]
    if isinstance(error, NoMemoryError) and asked["on_oom"] == "shrink" and batch > 1:
        size = _smaller(batch, accumulation)
        return *done, Adaptation(
            step=step, kind="shrink", why=f"out of memory at step {error.step}", learning_rate_share=share,
            per_device_train_batch_size=size, gradient_accumulation_steps=batch * accumulation // size,
        )  # fmt: skip
    back = sum(each.kind == "rollback" for each in done)
    if isinstance(error, NotFiniteError) and asked["on_nan"] == "rollback" and back < ROLLBACKS:
        return *done, Adaptation(
            step=step, kind="rollback", why=f"at step {error.step} {error.what}", learning_rate_share=share / 2,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
    return ()


def _smaller(batch: int, accumulation: int) -> int:
    """The largest batch of at most half the size of which a whole number makes up the same step."""
    return next(size for size in range(batch // 2, 0, -1) if not batch * accumulation % size)


def ended(error: StepError, job: Job, steps: Sequence[Step]) -> StageError:
    """What to tell of a training that ends with this error: the steps are those that it logged."""
    section = "align" if job.objective == "dpo" else "train"
    saved = checkpoints.stored(job.out)
    kept = f" {saved[-1].name} is kept in {job.out}." if saved else ""
    told = f"{section}: step {error.step} could not be taken{_rows(error.rows, job.rows)}: {error.what}."
    if isinstance(error, NoMemoryError):
        shrink = f"Set {section}.on_oom: shrink, which halves the batch and doubles the accumulation. "
        how = (shrink if job.options["per_device_train_batch_size"] > 1 else "") + less_memory(section)
    elif isinstance(error, NotFiniteError):
        how = f"No weight was changed by it. {_blame(error, job, steps, section)}"
    else:
        how = "Mend that"
    return StageError(f"{told}{kept} {how}. {GOING_ON}" if saved else f"{told} {how}")


def less_memory(section: str) -> str:
    """What to do about a training that does not fit."""
    return (
        f"Lower {section}.per_device_train_batch_size or {section}.max_length, or set {section}.gradient_checkpointing: true; "
        "'finetune estimate RECIPE' shows what each saves"
    )


def _blame(error: NotFiniteError, job: Job, steps: Sequence[Step], section: str) -> str:
    """Whose fault it most likely is (precision, learning rate, base or rows), and what to do."""
    losses = [step["loss"] for step in steps if math.isfinite(step["loss"])]
    rate = job.options["learning_rate"]
    if job.settings.get("dtype") == "float16" or job.options.get("fp16"):
        return (
            f"Most likely the precision's fault: float16 holds numbers up to {FLOAT16_LARGEST:,} only. Set model.dtype: "
            f"float32 (or bfloat16) and leave {section}.fp16 out"
        )
    if losses and losses[-1] > RISE * min(losses):
        return (
            f"Most likely the learning rate's fault: the loss had risen from {min(losses):.3g} to {losses[-1]:.3g} at "
            f"{section}.learning_rate {rate:g}. Set {rate / 10:g}, or {section}.on_nan: rollback, which halves it from the "
            "last checkpoint on"
        )
    if not losses:
        return (
            "It was the first step, so it is the fault of the base or of these rows: the base's weights are finite, but "
            "numbers on their way through it may not be. Look at these rows; try model.dtype: float32; or set "
            f"{section}.on_nan: skip to leave such steps out"
        )
    return (
        f"The loss was {losses[-1]:.3g} the step before, so it is most likely these rows' fault: look at them, or set "
        f"{section}.on_nan: skip to leave such steps out"
    )


def _rows(numbers: Sequence[int], file: Path) -> str:
    """The rows of a step, with the lines of the data that they are of."""
    if not numbers:
        return ""
    places = _places(file, set(numbers[:NAMED]))
    told = ", ".join(places.get(number, f"row {number}") for number in numbers[:NAMED])
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f" (its rows: {told}{more})"


def _places(file: Path, wanted: set[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            row: dict[str, Any] = json.loads(line)
            if row["row"] in wanted and "file" in row:
                found[row["row"]] = f"row {row['row']} of {Path(row['file']).name}:{row['line']}"
    return found
