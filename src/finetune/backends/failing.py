"""Steps that cannot be taken, told with their rows: what a backend raises from `train`, before the step changed a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.core.errors import FinetuneError, StageError, first_line

# How PyTorch, CUDA and MLX say that there is no memory left.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "unable to allocate", "insufficient memory")


class StepError(StageError):
    """A step that failed. `rows` are those of its batch by their numbers in the prepared file, none where rows are packed."""

    def __init__(self, what: str, *, step: int, rows: Sequence[int] = ()) -> None:
        self.what, self.step, self.rows = what, step, tuple(rows)
        super().__init__(f"step {step} failed: {what}")


class NotFiniteError(StepError):
    """A loss or gradient that is NaN or infinite. `grad_norm` is None where no gradient was computed."""

    def __init__(self, *, step: int, loss: float, grad_norm: float | None, rows: Sequence[int]) -> None:
        self.loss, self.grad_norm = loss, grad_norm
        super().__init__(not_finite(loss, grad_norm), step=step, rows=rows)


class NoMemoryError(StepError):
    """Out of memory, on the machine or its accelerator."""


def not_finite(loss: float, grad_norm: float | None) -> str:
    """What of a step is no finite number, in words; empty where all is."""
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    return f"its gradient is {grad_norm}" if grad_norm is not None and not math.isfinite(grad_norm) else ""


def skips(options: Mapping[str, Any], *, step: int, loss: float, grad_norm: float | None, rows: Sequence[int]) -> bool:
    """Whether this step is to change nothing (`on_nan: skip`). Raises NotFiniteError where it is to end the training."""
    policy = options.get("on_nan", "stop")
    if policy == "ignore" or not not_finite(loss, grad_norm):
        return False
    if policy == "skip":
        return True
    raise NotFiniteError(step=step, loss=loss, grad_norm=grad_norm, rows=rows)


def leaves_checkpoint(error: StepError, options: Mapping[str, Any]) -> bool:
    """Whether the step before a failed one is kept: what is to go back (`on_nan: rollback`) goes further than there."""
    return not (isinstance(error, NotFiniteError) and options.get("on_nan") == "rollback")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory, whoever's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in said for sign in OUT_OF_MEMORY)
    )


@contextmanager
def taking(step: int, rows: Sequence[int] = ()) -> Iterator[None]:
    """Whatever goes wrong inside, as a StepError of this step and these rows; errors of ours stay as they are."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise NoMemoryError("out of memory", step=step, rows=rows) from error
        raise StepError(f"{type(error).__name__}: {first_line(error)}", step=step, rows=rows) from error
