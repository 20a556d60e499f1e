"""How far two sets of next-token distributions are apart: Kullback-Leibler divergence, position by position.

KL(P || Q) = sum over the vocabulary of P (ln P - ln Q), in nats, with P the model that Q was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import StageError

BLOCK = 64  # positions at once: 25 MB for a vocabulary of 49,152


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """`kl` and `same_top` (is the likeliest token the same; of NaN there is none) for every position."""

    kl: list[float]
    same_top: list[bool]


def divergence(reference: Path, candidate: Path) -> Divergence:
    """Compare two `.npy` files (positions x vocabulary, natural-log probabilities). NaN stays NaN.

    A candidate may have more columns (a padded vocabulary): their probability is missing from the others, which shows.
    """
    import numpy

    ours, theirs = numpy.load(reference, mmap_mode="r"), numpy.load(candidate, mmap_mode="r")
    if len(ours) != len(theirs) or theirs.shape[1] < ours.shape[1]:
        raise StageError(
            f"the distributions cannot be compared: {ours.shape} positions x vocabulary in the one model, "
            f"{theirs.shape} in the other"
        )
    kl: list[float] = []
    same: list[bool] = []
    for start in range(0, len(ours), BLOCK):
        p, q = (_normal(each[start : start + BLOCK]) for each in (ours, theirs))
        q = q[:, : p.shape[1]]
        weight = numpy.exp(p)
        with numpy.errstate(invalid="ignore"):
            terms = numpy.where(weight > 0, weight * (p - q), 0.0)  # p ln p is 0 where p is
        unknown = numpy.isnan(p) | numpy.isnan(q)
        terms[unknown] = numpy.nan
        kl += [float(value) for value in terms.sum(-1)]
        same += [bool(value) for value in (p.argmax(-1) == q.argmax(-1)) & ~unknown.any(-1)]
    return Divergence(kl=kl, same_top=same)


def _normal(rows: Any) -> Any:
    """Log-probabilities as float64 that sum to one: float32's rounding alone would leave 1e-8 of divergence."""
    import numpy

    wide = numpy.asarray(rows, dtype=numpy.float64)
    with numpy.errstate(all="ignore"):  # rows without a finite number become NaN, which is what they are
        return wide - numpy.log(numpy.exp(wide).sum(-1, keepdims=True))


def top(file: Path, position: int, count: int = 5) -> list[tuple[int, float]]:
    """The likeliest tokens at a position, as (id, probability)."""
    import numpy

    row: Any = numpy.load(file, mmap_mode="r")[position]
    best: Sequence[int] = numpy.argsort(row)[::-1][:count].tolist()
    return [(int(token), float(numpy.exp(row[token]))) for token in best]


def gap(file: Path, position: int, tokens: Sequence[int]) -> float:
    """How much less likely (nats) the likeliest of `tokens` is than the likeliest token of all."""
    import numpy

    row: Any = numpy.load(file, mmap_mode="r")[position]
    return float(row.max()) - max(float(row[token]) for token in tokens)
