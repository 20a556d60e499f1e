"""Was the model wrecked while it learned?"""

from __future__ import annotations

import json
import math
from typing import Any

from finetune import evidence
from finetune.backends import get
from finetune.checks import Verdict, finite, judge, missing, silence, worst
from finetune.checks.artifacts import DRIFT, FRESH
from finetune.data import sources
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Run

ANSWERS = "evaluate/answers.jsonl"
HELDOUT = "evaluate/heldout.json"
KNOWN_MIN = 3  # fewer controls known beforehand say nothing about what was kept


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    verdicts: list[Verdict] = []
    if recipe.evaluate.controls is not None:
        verdicts.append(_controls(recipe, run))
    if recipe.evaluate.heldout is not None:
        verdicts += _heldout(recipe, run)
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
        why += silence([a["phases"]["base"]["text"] for a in controls])
        return missing(name, ">=", bound, "share", ANSWERS, why)
    final = list(known[0]["phases"])[-1]
    kept = [a for a in known if a["phases"][final]["correct"]]
    lost = next((a for a in known if a not in kept), None)
    why = f"{len(kept)} of the {len(known)} controls known before are known after"
    if lost:
        why += f"; lost: {lost['prompt']!r} -> {lost['phases'][final]['text'][:60]!r}"
    why += silence([a["phases"][final]["text"] for a in controls])
    return judge(name, len(kept) / len(known), ">=", bound, "share", ANSWERS, why)


def _heldout(recipe: Recipe, run: Run) -> list[Verdict]:
    name, bound = "heldout_perplexity", recipe.expect.heldout_ratio_max
    path = run.path / HELDOUT
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if len(values) < 2:
        return [missing(name, "<=", bound, "ratio", HELDOUT, "held-out text was not scored before and after")]
    final = list(values)[-1]
    before, after = values["base"]["perplexity"], values[final]["perplexity"]
    why = f"perplexity of text never trained: {before:.2f} before, {after:.2f} after, {values['base']['tokens']} tokens"
    return [
        judge(name, after / finite(before) if before else None, "<=", bound, "ratio", HELDOUT, why),
        _whole(recipe, run, values),
        _confirmed(recipe, run, values),
    ]


def _whole(recipe: Recipe, run: Run, values: dict[str, Any]) -> Verdict:
    """Every token of the held-out text but each text's first, counted again."""
    name = "heldout_whole"
    assert recipe.evaluate.heldout is not None
    try:
        rows = sources.read_jsonl_objects(recipe.evaluate.heldout)
        tokenizer = get(recipe.backend).tokenizer(evidence.phases(run, recipe)["base"][0])
    except FinetuneError as error:
        return missing(name, "==", 1.0, "share", HELDOUT, f"the text cannot be read again: {first_line(error)}")
    expected = sum(max(0, len(tokenizer.encode(row.values["text"])) - 1) for row in rows)
    odd = {phase: value["tokens"] for phase, value in values.items() if value["tokens"] != expected}
    why = f"{expected} tokens of {len(rows)} texts can be scored"
    why += "".join(f"; in '{phase}' {count} were" for phase, count in odd.items()) if odd else ", and were"
    share = min(value["tokens"] / expected for value in values.values()) if expected else None
    if odd and share is not None and share >= 1:
        share = max(odd.values()) / expected
    return judge(name, share, "==", 1.0, "share", HELDOUT, why)


def _confirmed(recipe: Recipe, run: Run, values: dict[str, Any]) -> Verdict:
    """The perplexity is that of the log-probabilities of its texts, which a fresh process found for the merged model."""
    name, bound, unit = "heldout_confirmed", DRIFT[recipe.model.dtype], "nats a token"
    path = run.path / FRESH
    fresh = json.loads(path.read_text(encoding="utf-8")).get("heldout") if path.is_file() else None
    if not fresh:
        return missing(name, "<=", bound, unit, FRESH, "no fresh process scored the held-out text")
    apart: dict[str, float] = {}
    for phase, value in values.items():
        apart[f"in '{phase}' the perplexity {value['perplexity']:.2f} is not that of its texts"] = _distance(
            value["perplexity"], [total for total, _ in value["texts"]], [count for _, count in value["texts"]]
        )
    final = list(values)[-1]
    for number, ((total, count), (again, tokens)) in enumerate(zip(values[final]["texts"], fresh, strict=False), 1):
        apart[f"text {number} scored otherwise by a fresh process"] = abs(total / count - again / tokens)
    distance = worst(apart.values())
    why = f"the perplexities are those of their {len(values[final]['texts'])} texts, {len(fresh)} of them scored again"
    if not distance <= bound:
        why = next(how for how, far in apart.items() if not far <= bound)
    return judge(name, distance, "<=", bound, unit, HELDOUT, why)


def _distance(perplexity: float, totals: list[float], counts: list[int]) -> float:
    """Nats a token between a perplexity and that of texts with these log-probabilities and tokens."""
    found = evidence.perplexity(sum(totals), sum(counts))
    if perplexity == found:  # both may be infinite
        return 0.0
    return abs(math.log(perplexity) - math.log(found)) if perplexity > 0 and found > 0 else math.nan
