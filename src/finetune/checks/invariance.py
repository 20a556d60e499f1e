"""Does the trainer leave unchanged what no correct trainer changes? From pairs of trainings of a tiny copy of the model."""

from __future__ import annotations

import json
import math
from typing import Any

from finetune.checks import Verdict, judge, missing, worst
from finetune.invariance import MEASURED, NAMES
from finetune.recipe import Recipe
from finetune.run import Run

MEAN, WORST = 1e-5, 1e-3  # nats, as TRL's own invariants have them; the mean catches a drift to one side
GRADIENTS = 1e-4  # relative distance of the norms; honest runs: 4e-7 at most with LoRA, 4e-6 with full fine-tuning
ADAPTER_EFFECT_MIN = 100 * MEAN  # what an adapter must change for a merge to show anything

WHAT = {
    "accumulation": "accumulating gradients over small batches is the same as one large batch",
    "checkpointing": "gradient checkpointing computes again what it did not keep, and nothing else",
    "packing": "rows in one pack are trained on as if each were alone",
    "padding": "padding is neither trained on nor attended to",
    "order": "the seed alone decides the order of the rows and the first weights",
    "merge": "the merged weights are those of the base with the adapter on",
}


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    path = run.path / MEASURED
    found = json.loads(path.read_text(encoding="utf-8"))["invariances"] if path.is_file() else {}
    return [verdict for name in NAMES for verdict in _verdicts(name, found.get(name))]


def not_applicable(evidence: dict[str, Any]) -> dict[str, str]:
    """The invariances that the recipe has no use for, and why: they get no verdict."""
    found = evidence["invariances"].items()
    return {name: each["not_applicable"] for name, each in found if "not_applicable" in each and not each["used"]}


def _verdicts(name: str, found: dict[str, Any] | None) -> list[Verdict]:
    """One verdict; none for what cannot be compared and the recipe does not use. What it uses must hold."""
    if found is None:
        return [_missing(name, "it was not measured")]
    if why := found.get("not_applicable"):
        return [_missing(name, f"the recipe uses it, and {why}")] if found["used"] else []
    if name == "order":
        return [_order(found)]
    if name == "merge" and (why := _without_effect(found)):
        return [_missing(name, why)]
    if not found["comparisons"]:
        return [_missing(name, "nothing was compared")]
    judged = [_compare(name, comparison) for comparison in found["comparisons"]]
    return [max(judged, key=lambda verdict: _share(verdict))]


def _missing(name: str, why: str) -> Verdict:
    return missing(f"invariant_{name}", "<=", MEAN, "nats", MEASURED, why)


def _share(verdict: Verdict) -> float:
    """How much of its bound a verdict takes up; all that is missing is beyond any."""
    measured = math.inf if verdict.measured is None else verdict.measured / verdict.bound
    return math.inf if math.isnan(measured) else measured


def _compare(name: str, comparison: dict[str, Any]) -> Verdict:
    """The distance that takes up most of its bound: of the losses, on average and at most, or of the gradients' norms."""
    one, other = comparison["one"], comparison["other"]
    pair = f"{one['what']} against {other['what']}" + (f" ({comparison['note']})" if "note" in comparison else "")
    lengths = {len(one["losses"]), len(other["losses"])}
    if len(lengths) != 1 or lengths == {0}:
        return _missing(name, f"{pair}: {len(one['losses'])} losses and {len(other['losses'])}")
    if one.get("rows") != other.get("rows"):
        return _missing(name, f"{pair}: they were not given the same rows in the same order, so their losses differ")
    losses = [abs(left - right) for left, right in zip(one["losses"], other["losses"], strict=True)]
    mean = sum(losses) / len(losses)
    norms = [_relative(*both) for both in zip(one.get("gradients", ()), other.get("gradients", ()), strict=True)]
    said = f"{pair}: losses differ by {mean:.1e} nats on average and {worst(losses):.1e} at most"
    if norms:
        said += f", gradients' norms by {worst(norms):.1e} of their size"
    why = f"{WHAT[name]}; {said}{_where(comparison, losses, norms)}"
    found = [judge(f"invariant_{name}", mean, "<=", MEAN, "nats on average", MEASURED, why)]
    found.append(judge(f"invariant_{name}", worst(losses), "<=", WORST, "nats at most", MEASURED, why))
    if norms:
        unit = "relative distance of gradients' norms"
        found.append(judge(f"invariant_{name}", worst(norms), "<=", GRADIENTS, unit, MEASURED, why))
    return max(found, key=_share)


def _relative(left: float | None, right: float | None) -> float:
    if left is None or right is None:
        return math.nan
    return abs(left - right) / max(left, right, 1e-12)


def _where(comparison: dict[str, Any], losses: list[float], norms: list[float]) -> str:
    """Which step they part at, where they do: at the first, nothing has been learned yet."""
    if comparison["of"] != "training":
        return ""
    apart = [place for place, loss in enumerate(losses, 1) if not loss <= 10 * MEAN]
    if not apart:
        return ""
    if apart[0] == 1:
        return "; they differ at the first step, where the weights are the same, so it is the loss that differs"
    if norms and not norms[0] <= GRADIENTS:
        return "; the first loss is the same, and its gradient is not"
    return f"; they part at step {apart[0]}"


def _order(found: dict[str, Any]) -> Verdict:
    """How many steps differ between two processes with the same seed; and whether another seed gives another order."""
    first, again, other = (found[key] for key in ("first", "again", "other_seed"))
    steps = list(zip(first["rows"], first["losses"], strict=True))
    same = list(zip(again["rows"], again["losses"], strict=True))
    name, unit = "invariant_order", "steps differ"
    if not steps or not any(first["rows"]):
        return missing(name, "==", 0, unit, MEASURED, "no row numbers were recorded")
    if other["rows"] == first["rows"]:
        why = f"{other['what']} gives the rows in the same order as {first['what']}: they are not shuffled by the seed"
        return judge(name, len(steps), "<", len(steps), "steps the same under another seed", MEASURED, why)
    differing = [place for place, both in enumerate(zip(steps, same, strict=False), 1) if both[0] != both[1]]
    count = len(differing) + abs(len(steps) - len(same))
    why = f"{WHAT['order']}; {len(steps)} steps in two processes, rows and losses bit by bit"
    if differing:
        place = differing[0] - 1
        what = "rows" if first["rows"][place] != again["rows"][place] else "losses of the same rows"
        why += f"; the {what} differ from step {place + 1} on"
    return judge(name, count, "==", 0, unit, MEASURED, why)


def _without_effect(found: dict[str, Any]) -> str:
    """Why a merge shows nothing: the adapter that was merged changes nothing."""
    on = [loss for comparison in found["comparisons"] for loss in comparison["one"]["losses"]]
    if len(on) != len(found["off"]) or not on:
        return f"{len(found['off'])} losses without the adapter, {len(on)} with it"
    effect = sum(abs(left - right) for left, right in zip(on, found["off"], strict=True)) / len(on)
    if effect >= ADAPTER_EFFECT_MIN:
        return ""
    return f"the adapter moves the losses by {effect:.1e} nats only, so a merge of it shows nothing"
