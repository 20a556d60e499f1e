"""Were the answers the likeliest ones, and does the report say what they come to? Parts of the check `questions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from finetune.checks import Part, Verdict, judge, missing
from finetune.checks.asked import base_tokenizer, phases, sets
from finetune.core.arithmetic import perplexity
from finetune.data.tokenizer import Tokenizer
from finetune.evaluation import REREAD
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import Answer, Question, Reread

ANSWERS, GREEDY, REPORT = layout.ANSWERS.path, layout.GREEDY.path, layout.report("evaluate").path
# Nats by which a token that was said may be behind the likeliest: what reading in one pass rounds otherwise than writing
# token by token. Eleven honest runs in float32 gave 0; the bounds are the ties that exports are allowed (parity.bounds).
GAP = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.2}
SUM = 1e-9  # relative distance of a mean taken again from the same numbers


def _greedy(recipe: Recipe, run: Run) -> list[Verdict]:
    """No token was said that another one was likelier than; an answer without an end is as long as it may be."""
    name, unit, bound = "answers_are_greedy", "nats behind", GAP[recipe.model.dtype]
    answers, read, there = evidence.rows(run, layout.ANSWERS), evidence.read(run, layout.GREEDY), phases(recipe)
    if not answers or list(read) != there:
        return [missing(name, "<=", bound, unit, GREEDY, f"the answers were not read again in: {', '.join(there)}")]
    most = recipe.evaluate.max_new_tokens
    odd = [asked for asked in answers for said in asked["phases"].values() if not _ended(said, most)]
    if odd:
        why = f"{len(odd)} answers neither end before their token {most} nor are that long, the first to "
        why += f"{odd[0]['prompt']!r}"
        return [judge(name, None, "<=", bound, unit, ANSWERS, why)]
    tokenizer = base_tokenizer(recipe, run)
    for phase in there:
        if why := _of_others(phase, read[phase], answers, tokenizer):
            return [missing(name, "<=", bound, unit, GREEDY, why)]
    phase = max(read, key=lambda each: _sortable(read[each]["gap"]))
    gap, worst, tokens = read[phase]["gap"], read[phase]["worst"], sum(each["tokens"] for each in read.values())
    assert gap is not None and worst is not None, "those of others were told apart"
    why = f"{tokens} tokens of the answers read again in one pass, every one the likeliest"
    if math.isnan(gap):
        why = f"the probabilities of '{phase}' are NaN at token {worst['position']} of its answer to "
        why += f"{worst['prompt']!r}"
    elif not gap <= bound:
        why = f"'{phase}' said {worst['said']!r} where {worst['likeliest']!r} was likelier, as token {worst['position']} of "
        why += f"its answer to {worst['prompt']!r}: it was drawn, or the prompt was not what the model saw"
    return [judge(name, gap, "<=", bound, unit, GREEDY, why)]


def _ended(said: Answer, most: int) -> bool:
    """Whether an answer has as many tokens as its end allows: the end-of-turn token is one of those it may have."""
    return len(said["ids"]) < most if said["finish"] == "stop" else len(said["ids"]) == most


def _of_others(phase: str, read: Reread, answers: list[Question], tokenizer: Tokenizer) -> str:
    """What was read again and is not in the answers; empty where all of it is."""
    chosen = [asked for asked in answers[:: -(-len(answers) // REREAD)] if phase in asked["phases"]]
    tokens = {asked["prompt"]: _tokens(asked["phases"][phase], tokenizer) for asked in chosen}
    count, worst = sum(len(_tokens(asked["phases"][phase], tokenizer)) for asked in chosen), read["worst"]
    if (read["answers"], read["tokens"]) != (len(chosen), count):
        why = f"'{phase}' has {count} tokens in {len(chosen)} answers, and {read['tokens']} in {read['answers']} were "
        return why + "read again"
    if worst is None or read["gap"] is None:
        return (
            f"'{phase}' names no token as the least likely one" if count else f"'{phase}' said nothing, not even an end"
        )
    there = tokens.get(worst["prompt"], [])
    said = tokenizer.decode(there[worst["position"] : worst["position"] + 1]) if worst["position"] >= 0 else ""
    if not said or said != worst["said"]:
        return f"'{phase}' did not say {worst['said']!r} as token {worst['position']} of {worst['prompt']!r}"
    return ""


def _tokens(said: Answer, tokenizer: Tokenizer) -> list[int]:
    """The ids of an answer, with the one that ended it."""
    return [*said["ids"], *(tokenizer.eos_ids[:1] if said["finish"] == "stop" else ())]


def _sortable(gap: float | None) -> float:
    return math.inf if gap is None or math.isnan(gap) else gap


# -- the report --------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Question], bool]] = {
    "trained": lambda asked: asked["set"] == "probes" and asked["kind"] == "trained",
    "paraphrase": lambda asked: asked["set"] == "probes" and asked["kind"] != "trained",
    "controls": lambda asked: asked["set"] == "controls",
    "unseen": lambda asked: asked["set"] == "unseen",
}


def _reported(recipe: Recipe, run: Run) -> list[Verdict]:
    """The numbers of the report, taken again from the answers and from the scores of held-out text."""
    said = evidence.read(run, layout.report("evaluate"))["metrics"]
    texts = evidence.read(run, layout.HELDOUT) if recipe.evaluate.heldout else {}
    scored = {f"perplexity_{phase}": perplexity(value["texts"]) for phase, value in texts.items()}
    found = {**_shares(recipe, run), **scored}
    odd = [(REPORT, key, said.get(key)) for key in {**found, **said} if not _same(found.get(key), said.get(key))]
    beside = {f"perplexity_{phase}": value["perplexity"] for phase, value in texts.items()}
    odd += [(layout.HELDOUT.path, key, beside[key]) for key in scored if not _same(scored[key], beside[key])]
    why = f"{len(found)} numbers of the report are those of the answers and of the held-out text"
    if odd:
        file, key, value = odd[0]
        why = f"{file} has {value} for '{key}', and what was asked comes to {found.get(key)}"
    return [judge("evaluated_as_reported", len(odd), "==", 0, "numbers otherwise", REPORT, why)]


def _shares(recipe: Recipe, run: Run) -> dict[str, float]:
    answers = evidence.rows(run, layout.ANSWERS) if sets(recipe) else []
    groups = {name: [asked["phases"] for asked in answers if belongs(asked)] for name, belongs in GROUPS.items()}
    return {
        f"{name}_correct_{phase}": sum(said[phase]["correct"] for said in chosen) / len(chosen)
        for name, chosen in groups.items()
        if chosen
        for phase in phases(recipe)
    }


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if one == other:  # infinity too
        return True
    return bool(abs(one - other) <= SUM * max(abs(one), abs(other)) or (one != one and other != other))


def _owes_greedy(recipe: Recipe) -> Iterable[str]:
    return ["answers_are_greedy"] if sets(recipe) else []


PARTS: tuple[Part, ...] = (
    Part(check=_greedy, owes=_owes_greedy, evidence=GREEDY),
    Part(check=_reported, owes=lambda recipe: ["evaluated_as_reported"], evidence=REPORT),
)
