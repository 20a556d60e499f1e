"""Means and perplexities of whatever was scored: nothing, infinity and NaN too."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

LARGEST = math.log(sys.float_info.max)  # nats, whose exp is a float

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, by the name of its type


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without a value, and where one is NaN (`statistics.fmean` raises at infinities of both signs)."""
    return sum(values) / len(values) if values else math.nan


def perplexity(texts: Sequence[Sequence[float]]) -> float:
    """exp of the mean negative log-probability of all tokens of some texts, each given as [sum of log-probabilities (nats),
    tokens]: NaN without a token and where a sum is, infinity where it is beyond a float."""
    total, count = (sum(text[place] for text in texts) for place in (0, 1))
    nats = -total / count if count else math.nan
    return math.inf if nats > LARGEST else math.exp(nats)
