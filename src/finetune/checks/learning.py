"""Does the model know now what it was taught, in other words too, and does it stop when it has said it?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from finetune.checks import Part, Verdict, judge
from finetune.checks.asked import BASE, answered, phases
from finetune.checks.expected import is_expected, not_given
from finetune.recipe import Recipe
from finetune.run import Run, layout
from finetune.run.records.evaluated import Question

ANSWERS = layout.ANSWERS.path
TRAINED, OTHER_WORDS, NET, STOPS = NAMES = (
    "learned_as_trained", "learned_paraphrased", "learned_net", "stops_by_itself",
)  # fmt: skip
LINE = '{{"prompt": "{}", "answer": "...", "match": "a name in the answer", "kind": "{}"}}'
ASK = f"add evaluate.probes: FILE (JSONL), a line a question: {LINE.format('a question of the data', 'trained')}"
UNKNOWN = "ask for facts that the base does not know"


class _Bound(NamedTuple):
    compare: str
    value: float
    unit: str


def _owes(recipe: Recipe) -> Iterable[str]:
    """Without questions one verdict says so, and those that the recipe expects by name."""
    if recipe.evaluate.probes is not None:
        return TRAINED, OTHER_WORDS, STOPS
    return TRAINED, *([STOPS] if is_expected(recipe, STOPS) else [])


def _owes_net(recipe: Recipe) -> Iterable[str]:
    return [NET] if recipe.evaluate.probes is not None or is_expected(recipe, NET) else []


def _asked(recipe: Recipe, run: Run) -> list[Verdict]:
    if recipe.evaluate.probes is None:
        return [_nothing_asked(recipe, name) for name in _owes(recipe)]
    probes = answered(recipe, run, "probes")
    trained = [asked for asked in probes if asked["kind"] == "trained"]
    other_words = [asked for asked in probes if asked["kind"] != "trained"]
    return [
        _learned(recipe, TRAINED, trained, "asked as in training"),
        _learned(recipe, OTHER_WORDS, other_words, "asked in words never trained"),
        _stops(recipe, trained),
    ]


def _nothing_asked(recipe: Recipe, name: str) -> Verdict:
    why = "what the model knows was not examined: the recipe has no questions (evaluate.probes)"
    return not_given(recipe, name, *_bound(recipe, name), ANSWERS, why, ASK)


def _bound(recipe: Recipe, name: str) -> _Bound:
    expect = recipe.expect
    learned = _Bound(">", expect.learned_min, "share improved")
    net, stops = _Bound(">", expect.unseen_margin_min, "share"), _Bound(">=", expect.stopped_min, "share")
    return {TRAINED: learned, OTHER_WORDS: learned, NET: net, STOPS: stops}[name]


def improved(answers: list[Question], final: str) -> float | None:
    """Of the questions wrong before, the share now right *and* with a likelier expected answer. None without any."""
    wrong = [asked["phases"] for asked in answers if not asked["phases"][BASE]["correct"]]
    if not wrong:
        return None
    better = [said for said in wrong if said[final]["correct"] and said[final]["logprob"] > said[BASE]["logprob"]]
    return len(better) / len(wrong)


def _learned(recipe: Recipe, name: str, answers: list[Question], how: str) -> Verdict:
    final, bound = phases(recipe)[-1], _bound(recipe, name)
    share = improved(answers, final)
    if share is None:
        question, kind = (
            ("a question of the data", "trained") if name == TRAINED else ("the same in other words", "paraphrase")
        )
        line = f"add lines to evaluate.probes ({recipe.evaluate.probes}): {LINE.format(question, kind)}"
        if answers:
            why = "every probe was right before training; they prove nothing"
            return not_given(recipe, name, *bound, ANSWERS, why, f"{UNKNOWN}; {line}")
        return not_given(recipe, name, *bound, ANSWERS, f"no such probes: none is of the kind '{kind}'", line)
    likelier = sum(asked["phases"][final]["logprob"] > asked["phases"][BASE]["logprob"] for asked in answers)
    right = sum(asked["phases"][final]["correct"] for asked in answers)
    why = f"{how}: {right} of {len(answers)} right after, expected answer likelier in {likelier}"
    return judge(name, share, *bound, ANSWERS, why)


def _net(recipe: Recipe, run: Run) -> list[Verdict]:
    """The share improved, less what 'improves' of facts that nobody taught."""
    bound, final = _bound(recipe, NET), phases(recipe)[-1]
    if recipe.evaluate.probes is None:
        return [_nothing_asked(recipe, name) for name in _owes_net(recipe)]
    if recipe.evaluate.unseen is None:
        why = "no untrained facts (evaluate.unseen) to compare with"
        line = LINE.format("a fact of the same kind that is not in the data", "unseen")
        return [
            not_given(recipe, NET, *bound, ANSWERS, why, f"add evaluate.unseen: FILE (JSONL), a line a fact: {line}")
        ]
    trained = [asked for asked in answered(recipe, run, "probes") if asked["kind"] == "trained"]
    share, control = improved(trained, final), improved(answered(recipe, run, "unseen"), final)
    if share is None or control is None:
        what, key = ("probe as trained", "probes") if share is None else ("untrained fact", "unseen")
        why = f"there is no {what} that was wrong before training"
        remedy = f"{UNKNOWN}; add lines to evaluate.{key} ({getattr(recipe.evaluate, key)})"
        return [not_given(recipe, NET, *bound, ANSWERS, why, remedy)]
    why = f"share improved less the share of untrained facts 'improved' ({control:.2f})"
    return [judge(NET, share - control, *bound, ANSWERS, why)]


def _stops(recipe: Recipe, trained: list[Question]) -> Verdict:
    final, bound = phases(recipe)[-1], _bound(recipe, STOPS)
    if not trained:
        return not_given(recipe, STOPS, *bound, ANSWERS, "no probe is of the kind 'trained'", ASK)
    stopped = sum(asked["phases"][final]["finish"] == "stop" for asked in trained)
    why = f"{stopped} of {len(trained)} answers ended with the end-of-turn token"
    return judge(STOPS, stopped / len(trained), *bound, ANSWERS, why)


PARTS: tuple[Part, ...] = (
    Part(check=_asked, owes=_owes, evidence=ANSWERS),
    Part(check=_net, owes=_owes_net, evidence=ANSWERS),
)
