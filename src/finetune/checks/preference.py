"""Did alignment start from an honest reference and move towards the chosen answers?"""

from __future__ import annotations

import math
import statistics

from finetune import evidence
from finetune.checks import Verdict, judge, missing
from finetune.checks.loss import window
from finetune.recipe import Recipe
from finetune.run import Run

EVENTS = "events.jsonl"
PAIRS = "evaluate/preferences.jsonl"
START = {"sigmoid": math.log(2), "hinge": 1.0}  # the loss where policy and reference agree on everything


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    assert recipe.align is not None
    steps = evidence.steps(run, "align")
    if not steps:
        return [missing("dpo_start", "<=", 1e-3, "nats", EVENTS, "alignment logged no step")]
    verdicts = []
    if recipe.align.loss_type in START:
        start = START[recipe.align.loss_type]
        verdicts.append(
            judge(
                "dpo_start", abs(steps[0]["loss"] - start), "<=", 1e-3, "nats", EVENTS,
                f"the first loss {steps[0]['loss']:.4f} must be {start:.4f}: policy and reference are the same model then",
            )
        )  # fmt: skip
    margins = [step.get("rewards/margins") for step in steps]
    logged = [margin for margin in margins if isinstance(margin, int | float)]
    size = window(len(logged))
    growth = statistics.fmean(logged[-size:]) - logged[0] if len(logged) > 1 else None
    verdicts.append(
        judge("dpo_margin_grows", growth, ">", 0.0, "reward", EVENTS, "margin of the last steps less that of the first")
    )
    return verdicts + _scored(recipe, run)


def _scored(recipe: Recipe, run: Run) -> list[Verdict]:
    """Pairs scored afresh with the aligned model and with the one before alignment."""
    assert recipe.align is not None
    bound = recipe.expect.preference_accuracy_min
    path = run.path / PAIRS
    pairs = evidence.read_rows(run, PAIRS, "evaluate") if path.is_file() else []
    if not pairs or "aligned" not in pairs[0]["phases"]:
        return [missing("dpo_prefers_chosen", ">=", bound, "share", PAIRS, "the pairs were not scored after alignment")]
    reference = "trained" if "trained" in pairs[0]["phases"] else "base"
    if reference not in pairs[0]["phases"]:
        return [
            missing("dpo_prefers_chosen", ">=", bound, "share", PAIRS, "the pairs were not scored before alignment")
        ]
    margins = []
    for pair in pairs:
        gain = {key: pair["phases"]["aligned"][key] - pair["phases"][reference][key] for key in ("chosen", "rejected")}
        margins.append(recipe.align.beta * (gain["chosen"] - gain["rejected"]))
    won = sum(margin > 0 for margin in margins) / len(margins)
    return [
        judge(
            "dpo_prefers_chosen", won, ">=", bound, "share", PAIRS,
            f"pairs, of {len(pairs)}, whose chosen answer gained on the rejected one, scored afresh from disk",
        ),
        judge(
            "dpo_margin", statistics.fmean(margins), ">", 0.0, "reward", PAIRS,
            "mean reward margin over the pairs, scored afresh from disk",
        ),
    ]  # fmt: skip
