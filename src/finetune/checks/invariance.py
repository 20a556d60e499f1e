"""Does the trainer leave unchanged what no correct trainer changes? From pairs of trainings of a tiny copy of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from finetune.checks import Part, Verdict, judge, missing, not_examined, worst
from finetune.core.errors import StageError
from finetune.experiments.invariance import MEASURED, NAMES, lacks, tiny_copy, uses
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.measured import Comparison, Invariance, Invariances

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


# What is compared for each, in order; of `order` there are three trainings instead.
OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("accumulation", "checkpointing", "packing"), ("training",)),
    "padding": ("training", "scores", "answers"),
    "merge": ("scores",),
}


def _owed(recipe: Recipe) -> list[str]:
    """The invariances that concern a recipe: what it uses must hold, and what it could use."""
    return [name for name in NAMES if name not in lacks(recipe) or uses(recipe, name)]


def _owes(recipe: Recipe) -> Iterable[str]:
    return [f"invariant_{name}" for name in _owed(recipe)]


def _check(recipe: Recipe, run: Run) -> list[Verdict]:
    seen = evidence.read(run, layout.INVARIANCE)
    if seen["backend"] != recipe.backend:
        raise StageError(f"measured with the backend '{seen['backend']}', and the recipe's is '{recipe.backend}'")
    return [_verdict(name, recipe, run, seen["invariances"].get(name)) for name in _owed(recipe)]


def not_applicable(found: Invariances) -> dict[str, str]:
    """The invariances that the recipe has no use for, and why: there was nothing to compare."""
    each = found["invariances"].items()
    return {name: one["not_applicable"] for name, one in each if "not_applicable" in one and not one["used"]}


def _verdict(name: str, recipe: Recipe, run: Run, found: Invariance | None) -> Verdict:
    if found is None:
        return _missing(name, "it was not measured")
    if why := found.get("not_applicable"):
        return _without(name, recipe, run, why)
    if name == "order":
        return _order(found)
    there = found.get("comparisons", [])
    if not there:
        return _missing(name, "nothing was compared")
    if tuple(each["of"] for each in there) != OF[name]:
        return _missing(name, f"compared were {[each['of'] for each in there]}, and not {list(OF[name])}")
    if name == "merge" and (why := _without_effect(found)):
        return _missing(name, why)
    return max((_compare(name, each) for each in there), key=_share)


def _without(name: str, recipe: Recipe, run: Run, why: str) -> Verdict:
    """Of what was not compared: what the recipe uses must hold; else it may be that the model cannot do it."""
    if uses(recipe, name):
        return _missing(name, f"the recipe uses it, and {why}")
    if name != "packing" or not tiny_copy.unpackable(Path(evidence.fetched(run)["base"])):
        return _missing(name, f"it was not compared ({why}), and it can be")
    remedy = "nothing: this recipe does not pack rows. A model that takes positions can be trained with packing"
    return not_examined(f"invariant_{name}", "<=", MEAN, "nats", MEASURED, f"not applicable: {why}", remedy)


def _missing(name: str, why: str) -> Verdict:
    return missing(f"invariant_{name}", "<=", MEAN, "nats", MEASURED, why)


def _share(verdict: Verdict) -> float:
    """How much of its bound a verdict takes up; all that is missing is beyond any."""
    measured = math.inf if verdict.measured is None else verdict.measured / verdict.bound
    return math.inf if math.isnan(measured) else measured


def _compare(name: str, comparison: Comparison) -> Verdict:
    """The distance that takes up most of its bound: of the losses, on average and at most, or of the gradients' norms."""
    one, other = comparison["one"], comparison["other"]
    pair = f"{one['what']} against {other['what']}" + (f" ({comparison['note']})" if "note" in comparison else "")
    lengths = {len(one["losses"]), len(other["losses"])}
    if len(lengths) != 1 or lengths == {0}:
        return _missing(name, f"{pair}: {len(one['losses'])} losses and {len(other['losses'])}")
    if one.get("rows") != other.get("rows"):
        return _missing(name, f"{pair}: they were not given the same rows in the same order, so their losses differ")
    if comparison["of"] == "training" and not len(one.get("gradients", [])) == len(other.get("gradients", [])) > 0:
        return _missing(name, f"{pair}: not every step of both has a gradient")
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


def _where(comparison: Comparison, losses: list[float], norms: list[float]) -> str:
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


def _order(found: Invariance) -> Verdict:
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


def _without_effect(found: Invariance) -> str:
    """Why a merge shows nothing: the adapter that was merged changes nothing."""
    on = [loss for comparison in found["comparisons"] for loss in comparison["one"]["losses"]]
    if len(on) != len(found["off"]) or not on:
        return f"{len(found['off'])} losses without the adapter, {len(on)} with it"
    effect = sum(abs(left - right) for left, right in zip(on, found["off"], strict=True)) / len(on)
    if effect >= ADAPTER_EFFECT_MIN:
        return ""
    return f"the adapter moves the losses by {effect:.1e} nats only, so a merge of it shows nothing"


PARTS: tuple[Part, ...] = (Part(check=_check, owes=_owes, evidence=MEASURED),)
