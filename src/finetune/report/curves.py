"""The steps of a training as curves: thinned to what a screen can show, with nothing lost that matters."""

from __future__ import annotations

import math
from typing import Any

BUCKETS = 80
FIELDS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "margin", "accuracy")
_LOGGED = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
_EXTREMES = ("loss", "grad_norm")
_NAMED = 10  # steps that are named of those whose number is none


def curve(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The curve of a stage's step events (see `evidence.steps`).

    `points` hold step and FIELDS (nats, nats, -, -, tokens a second, reward, share), as far as they were logged.
    `steps` counts all, `shown` those in `points`. `not_finite` tells, by field, how many values are NaN or infinite
    and the first steps of them. `ends` tells, by field, first, last, lowest and highest finite value with their steps.
    """
    points = [_point(step) for step in steps]
    kept = points if len(points) <= 4 * BUCKETS else _thinned(points)
    return {
        "steps": len(points),
        "shown": len(kept),
        "not_finite": {name: found for name in FIELDS if (found := _not_finite(points, name))},
        "ends": {name: found for name in FIELDS if (found := _ends(points, name))},
        "points": kept,
    }


def _point(step: dict[str, Any]) -> dict[str, Any]:
    found = {name: step.get(_LOGGED.get(name, name)) for name in FIELDS}
    if step.get("seconds") and step.get("tokens") is not None:
        found["tokens_per_second"] = round(step["tokens"] / step["seconds"], 2)
    return {"step": step["step"], **{name: value for name, value in found.items() if value is not None}}


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every bucket the lowest and highest loss and gradient norm and one value that is none; the first and the
    last step; every step with an evaluation, up to a bucket's one."""
    kept = {0, len(points) - 1}
    for bucket in range(BUCKETS):
        here = range(bucket * len(points) // BUCKETS, (bucket + 1) * len(points) // BUCKETS)
        for name in _EXTREMES:
            finite = [place for place in here if _finite(points[place].get(name))]
            if finite:
                kept |= {min(finite, key=lambda at: points[at][name]), max(finite, key=lambda at: points[at][name])}
            kept |= set([place for place in here if name in points[place] and not _finite(points[place][name])][:1])
        kept |= set([place for place in here if "eval_loss" in points[place]][-1:])
    return [points[place] for place in sorted(kept)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _not_finite(points: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    steps = [point["step"] for point in points if name in point and not _finite(point[name])]
    return {"count": len(steps), "steps": steps[:_NAMED]} if steps else None


def _ends(points: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """{first, last, lowest, highest}: each {step, value}."""
    found = [{"step": point["step"], "value": point[name]} for point in points if _finite(point.get(name))]
    if not found:
        return None
    lowest, highest = (choose(found, key=lambda each: each["value"]) for choose in (min, max))
    return {"first": found[0], "last": found[-1], "lowest": lowest, "highest": highest}
