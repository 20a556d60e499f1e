"""Was the model wrecked while it learned?"""

from __future__ import annotations

import math

from finetune.checks import Part, Verdict, finite, judge, missing, silence, worst
from finetune.checks.artifacts import DRIFT
from finetune.checks.asked import BASE, answered, base_tokenizer, phases
from finetune.checks.expected import not_given
from finetune.core.arithmetic import perplexity
from finetune.core.errors import StageError
from finetune.data import sources
from finetune.experiments import FRESH_TEXTS
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import HeldOut

ANSWERS, HELDOUT, FRESH = layout.ANSWERS.path, layout.HELDOUT.path, layout.FRESH.path
KNOWN_MIN = 3  # fewer controls known beforehand say nothing about what was kept


def _controls(recipe: Recipe, run: Run) -> list[Verdict]:
    name, bound, file = "controls_kept", recipe.expect.controls_kept_min, recipe.evaluate.controls
    line = '{"prompt": "a general question that the base answers", "answer": "...", "match": "a name in the answer"}'
    if file is None:
        why = "whether the model still knows what it knew was not examined: no general questions (evaluate.controls)"
        remedy = f"add evaluate.controls: FILE (JSONL), a line a question: {line}"
        return [not_given(recipe, name, ">=", bound, "share", ANSWERS, why, remedy)]
    controls, final = answered(recipe, run, "controls"), phases(recipe)[-1]
    silent = silence([asked["phases"][final]["text"] for asked in controls])
    known = [asked for asked in controls if asked["phases"][BASE]["correct"]]
    if len(known) < KNOWN_MIN:
        why = f"the base answers {len(known)} of {len(controls)} controls; at least {KNOWN_MIN} are needed"
        if silent:  # more questions would find nothing either
            return [missing(name, ">=", bound, "share", ANSWERS, why + silent)]
        remedy = f"add lines to evaluate.controls ({file}): {line}"
        return [not_given(recipe, name, ">=", bound, "share", ANSWERS, why, remedy)]
    lost = [asked for asked in known if not asked["phases"][final]["correct"]]
    why = f"{len(known) - len(lost)} of the {len(known)} controls known before are known after"
    if lost:
        why += f"; lost: {lost[0]['prompt']!r} -> {lost[0]['phases'][final]['text'][:60]!r}"
    why += silent
    return [judge(name, 1 - len(lost) / len(known), ">=", bound, "share", ANSWERS, why)]


def _scored(recipe: Recipe, run: Run) -> dict[str, HeldOut]:
    """What held-out text scored at each point. Raises StageError where one lacks."""
    values = evidence.read(run, layout.HELDOUT)
    if list(values) != phases(recipe):
        raise StageError(f"held-out text was scored in {', '.join(values) or 'no phase'}, not in {phases(recipe)}")
    return values


def _heldout(recipe: Recipe, run: Run) -> list[Verdict]:
    name, bound = "heldout_perplexity", recipe.expect.heldout_ratio_max
    if recipe.evaluate.heldout is None:
        why = "whether other text stays as likely as it was was not examined: there is none (evaluate.heldout)"
        remedy = 'add evaluate.heldout: FILE (JSONL), a line a text that is never trained: {"text": "..."}'
        return [not_given(recipe, name, "<=", bound, "ratio", HELDOUT, why, remedy)]
    values = _scored(recipe, run)
    before, after = values[BASE], values[phases(recipe)[-1]]
    why = f"perplexity of text never trained: {before['perplexity']:.2f} before, {after['perplexity']:.2f} after, "
    why += f"{before['tokens']} tokens"
    ratio = after["perplexity"] / finite(before["perplexity"]) if before["perplexity"] else None
    return [judge(name, ratio, "<=", bound, "ratio", HELDOUT, why), _whole(recipe, run, values)]


def _whole(recipe: Recipe, run: Run, values: dict[str, HeldOut]) -> Verdict:
    """Every token of the held-out text but each text's first, counted again."""
    assert recipe.evaluate.heldout is not None
    rows = sources.read_jsonl_objects(recipe.evaluate.heldout)
    tokenizer = base_tokenizer(recipe, run)
    each = [count for row in rows if (count := len(tokenizer.encode(row.values["text"])) - 1) > 0]
    found = {phase: [tokens for _, tokens in value["texts"]] for phase, value in values.items()}
    odd = {phase: values[phase]["tokens"] for phase, counts in found.items() if counts != each}
    odd |= {phase: value["tokens"] for phase, value in values.items() if value["tokens"] != sum(each)}
    why = f"{sum(each)} tokens of {len(rows)} texts can be scored"
    why += "".join(f"; in '{phase}' {count} were" for phase, count in odd.items()) if odd else ", and were"
    missed = sum(phase in odd for phase in values)
    return judge("heldout_whole", 1 - missed / len(values), "==", 1.0, "share of phases", HELDOUT, why)


def _confirmed(recipe: Recipe, run: Run) -> list[Verdict]:
    """The perplexity is that of the log-probabilities of its texts, which a fresh process found for the merged model."""
    name, bound, unit = "heldout_confirmed", DRIFT[recipe.model.dtype], "nats a token"
    values, fresh = _scored(recipe, run), evidence.read(run, layout.FRESH).get("heldout", [])
    final = values[phases(recipe)[-1]]["texts"]
    if not fresh or [count for _, count in fresh] != [count for _, count in final[:FRESH_TEXTS]]:
        why = f"a fresh process scored {len(fresh)} of the first {len(final[:FRESH_TEXTS])} texts, or other tokens"
        return [missing(name, "<=", bound, unit, FRESH, why)]
    apart: dict[str, float] = {}
    for phase, value in values.items():
        apart[f"in '{phase}' the perplexity {value['perplexity']:.2f} is not that of its texts"] = _distance(
            value["perplexity"], perplexity(value["texts"])
        )
    for number, (one, other) in enumerate(zip(final, fresh, strict=False), 1):
        apart[f"text {number} scored otherwise by a fresh process"] = abs(one[0] / one[1] - other[0] / other[1])
    distance = worst(apart.values())
    why = f"the perplexities are those of their {len(final)} texts, {len(fresh)} of them scored again"
    if not distance <= bound:
        why = next(how for how, far in apart.items() if not far <= bound)
    return [judge(name, distance, "<=", bound, unit, HELDOUT, why)]


def _distance(said: float, found: float) -> float:
    """Nats a token between two perplexities."""
    if said == found:  # both may be infinite
        return 0.0
    return abs(math.log(said) - math.log(found)) if said > 0 and found > 0 else math.nan


PARTS: tuple[Part, ...] = (
    Part(check=_controls, owes=lambda recipe: ["controls_kept"], evidence=ANSWERS),
    Part(
        check=_heldout,
        owes=lambda recipe: ["heldout_perplexity", *(["heldout_whole"] if recipe.evaluate.heldout else [])],
        evidence=HELDOUT,
    ),
    Part(
        check=_confirmed,
        owes=lambda recipe: ["heldout_confirmed"] if recipe.evaluate.heldout else [],
        evidence=FRESH,
    ),
)
