"""Was the model wrecked while it learned?"""

from __future__ import annotations

import json

from finetune import evidence
from finetune.checks import Verdict, judge, missing
from finetune.recipe import Recipe
from finetune.run import Run

ANSWERS = "evaluate/answers.jsonl"
HELDOUT = "evaluate/heldout.json"
KNOWN_MIN = 3  # fewer controls known beforehand say nothing about what was kept


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    verdicts = []
    if recipe.evaluate.controls is not None:
        verdicts.append(_controls(recipe, run))
    if recipe.evaluate.heldout is not None:
        verdicts.append(_heldout(recipe, run))
    return verdicts


def _controls(recipe: Recipe, run: Run) -> Verdict:
    name, bound = "controls_kept", recipe.expect.controls_kept_min
    path = run.path / ANSWERS
    controls = (
        [a for a in evidence.read_rows(run, ANSWERS, "evaluate") if a["set"] == "controls"] if path.is_file() else []
    )
    known = [a for a in controls if a["phases"]["base"]["correct"]]
    if len(known) < KNOWN_MIN:
        why = f"the base answers {len(known)} of {len(controls)} controls; at least {KNOWN_MIN} are needed"
        return missing(name, ">=", bound, "share", ANSWERS, why)
    final = list(known[0]["phases"])[-1]
    kept = [a for a in known if a["phases"][final]["correct"]]
    lost = next((a for a in known if a not in kept), None)
    why = f"{len(kept)} of the {len(known)} controls known before are known after"
    if lost:
        why += f"; lost: {lost['prompt']!r} -> {lost['phases'][final]['text'][:60]!r}"
    return judge(name, len(kept) / len(known), ">=", bound, "share", ANSWERS, why)


def _heldout(recipe: Recipe, run: Run) -> Verdict:
    name, bound = "heldout_perplexity", recipe.expect.heldout_ratio_max
    path = run.path / HELDOUT
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if len(values) < 2:
        return missing(name, "<=", bound, "ratio", HELDOUT, "held-out text was not scored before and after")
    final = list(values)[-1]
    before, after = values["base"]["perplexity"], values[final]["perplexity"]
    why = f"perplexity of text never trained: {before:.2f} before, {after:.2f} after, {values['base']['tokens']} tokens"
    return judge(name, after / before, "<=", bound, "ratio", HELDOUT, why)
