"""What optimizer steps do to the weights, watched on a sample: one that is skipped or scaled logs as any other does."""

from __future__ import annotations

import math
from array import array
from typing import Any

SAMPLE = 16  # elements of every trained tensor that are compared; all of them would cost as much as the step
# A step with less than this share of the full rate may round to nothing in half precision, as a schedule's last ones do.
FULL_ENOUGH = 0.1
# Steps whose gradients are measured as the optimizer gets them; all steps of a large model would take long.
CLIPPED_STEPS = 20


class Motion:
    """Counts the steps that left the sampled weights as they were, and measures the first that should have moved them.

    `full`: the recipe's learning rate; `weights`: the sample before the first step, as float32 bytes; `fresh`: whether the
    optimizer begins without a past, so that the size of its first step says something.
    """

    def __init__(self, full: float, weights: bytes, *, fresh: bool) -> None:
        self.least, self.weights, self.fresh = FULL_ENOUGH * full, weights, fresh
        self.without = 0
        self.first: float | None = None

    def stepped(self, rate: float, weights: bytes) -> None:
        """A step was taken with the learning rate `rate`, and these are the sampled weights after it."""
        if rate > 0:
            if self.fresh and self.first is None:
                self.first = _most(self.weights, weights) / rate
            if rate >= self.least and weights == self.weights:
                self.without += 1
        self.weights = weights

    def facts(self) -> dict[str, Any]:
        """`steps_without_effect`, and `first_move`: the most that a weight moved in the first step, over its rate."""
        moved = {} if self.first is None else {"first_move": self.first}
        return {"steps_without_effect": self.without, **moved}


def _most(before: bytes, after: bytes) -> float:
    moves = [abs(new - old) for old, new in zip(array("f", before), array("f", after), strict=True)]
    return math.nan if any(map(math.isnan, moves)) else max(moves, default=0.0)
