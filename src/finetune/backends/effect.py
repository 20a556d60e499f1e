"""Does every optimizer step move the weights? A step that is skipped in silence looks like any other in the log."""

from __future__ import annotations

SAMPLE = 16  # elements of every trained tensor that are compared; all of them would cost as much as the step
# A step with less than this share of the full rate may round to nothing in half precision, as a schedule's last ones do.
FULL_ENOUGH = 0.1


class Effect:
    """Counts the steps that left the sampled weights as they were, bit by bit.

    `full`: the recipe's learning rate; `weights`: the sample before the first step, as the backend's bytes.
    """

    def __init__(self, full: float, weights: bytes) -> None:
        self.least, self.weights = FULL_ENOUGH * full, weights
        self.without = 0

    def stepped(self, rate: float, weights: bytes) -> None:
        """A step was taken with the learning rate `rate`, and these are the sampled weights after it."""
        if rate > 0 and rate >= self.least and weights == self.weights:
            self.without += 1
        self.weights = weights
