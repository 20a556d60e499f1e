"""The learning rate of every step, as transformers' schedules have it
(https://huggingface.co/docs/transformers/main_classes/optimizer_schedules), with the arguments that a Trainer gives them."""

from __future__ import annotations

import math
from collections.abc import Callable

POLYNOMIAL_END = 1e-7  # transformers' lr_end, with its power of 1
UNWARMED = 10_000  # the timescale of inverse_sqrt without a warm-up

# After the warm-up, as a share of the peak: of (steps since, steps from there to the end, steps of the warm-up, peak).
_Shape = Callable[[int, int, int, float], float]
_SHAPES: dict[str, _Shape] = {
    "constant_with_warmup": lambda done, left, warm, peak: 1.0,
    "linear": lambda done, left, warm, peak: max(0.0, 1 - done / left),
    "polynomial": lambda done, left, warm, peak: (
        POLYNOMIAL_END / peak + (1 - POLYNOMIAL_END / peak) * (1 - done / left)
    ),
    "cosine": lambda done, left, warm, peak: 0.5 * (1 + math.cos(math.pi * min(1.0, done / left))),
    "cosine_with_restarts": lambda done, left, warm, peak: 0.5 * (1 + math.cos(math.pi * min(1.0, done / left))),
    "inverse_sqrt": lambda done, left, warm, peak: math.sqrt((warm or UNWARMED) / (done + (warm or UNWARMED))),
}


def learning_rate(kind: str, peak: float, warmup: float, step: int, total: int) -> float:
    """The rate that a step is taken with (the first is 1). `warmup` is a number of steps, or below 1 a share of all."""
    if kind == "constant" or not peak:
        return peak
    warm, done = math.ceil(total * warmup) if warmup < 1 else int(warmup), step - 1
    if done < warm:
        return peak * done / warm
    return peak * _SHAPES[kind](done - warm, max(1, total - warm), warm, peak)
