"""Were the questions all asked, as in training, answered greedily and judged strictly, and kept out of the training?"""

from __future__ import annotations

import json
import math
from typing import Any

from finetune import evidence
from finetune.answers import is_correct, normalize
from finetune.checks import Verdict, judge, leaks, missing
from finetune.checks.rows import rendering
from finetune.data import encode, formats, sources
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Run, read_jsonl

ANSWERS = "evaluate/answers.jsonl"
GREEDY = "evaluate/greedy.json"
PROMPTS = "evaluate/prompts.jsonl"
SETS = ("probes", "controls", "unseen")
OTHERS = 20  # answers to other questions that each question is tried with
# Nats by which a token that was said may be behind the likeliest: what reading in one pass rounds otherwise than writing
# token by token. Eleven honest runs in float32 gave 0; the bounds are the ties that exports are allowed (parity.bounds).
GAP = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.2}


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    try:
        examples = leaks.trained(recipe, run)
        leaked = leaks.nothing_leaked(recipe, examples)
    except FinetuneError as error:
        examples = {}
        leaked = missing(
            "nothing_leaked", "==", 0, "leaked", ANSWERS, f"data cannot be read again: {first_line(error)}"
        )
    if not any(getattr(recipe.evaluate, name) for name in SETS):
        return [leaked]
    path = run.path / ANSWERS
    answers = evidence.read_rows(run, ANSWERS, "evaluate") if path.is_file() else []
    if not answers:
        return [leaked, missing("every_question_asked", "==", 1.0, "share", ANSWERS, "no question was asked")]
    return [
        leaked,
        _all_asked(recipe, run, answers),
        _asked_as_trained(recipe, run, answers, examples),
        _judged_again(answers),
        _judged_strictly(answers),
        _greedy(recipe, run, answers),
    ]


def _all_asked(recipe: Recipe, run: Run, answers: list[dict[str, Any]]) -> Verdict:
    """Every question of every file, in every phase of the run."""
    name = "every_question_asked"
    try:
        wanted = [
            (which, row.values.get("prompt"), row.values.get("answer"))
            for which in SETS
            if (file := getattr(recipe.evaluate, which))
            for row in sources.read_jsonl_objects(file)
        ]
    except FinetuneError as error:
        return missing(name, "==", 1.0, "share", ANSWERS, f"the questions cannot be read again: {first_line(error)}")
    phases = list(evidence.phases(run, recipe))
    asked = [(a["set"], a["prompt"], a["answer"]) for a in answers if list(a["phases"]) == phases]
    left = list(asked)
    lost = [each for each in wanted if not _take(left, each)]
    why = f"{len(wanted) - len(lost)} of the {len(wanted)} questions in the files have an answer of {', '.join(phases)}"
    if lost:
        why += f"; not asked: {len(lost)}, first {lost[0][1]!r} of {lost[0][0]}"
    if left:
        why += f"; asked, and in no file: {len(left)}, first {left[0][1]!r}"
    share = (len(wanted) - len(lost)) / (len(wanted) + len(left)) if wanted else None
    return judge(name, share, "==", 1.0, "share", ANSWERS, why)


def _take(those: list[Any], each: Any) -> bool:
    if each not in those:
        return False
    those.remove(each)
    return True


def _asked_as_trained(
    recipe: Recipe, run: Run, answers: list[dict[str, Any]], examples: dict[int, formats.Example]
) -> Verdict:
    """The ids that the model was given are those that a trained row of the same question begins with; of a question that
    is in no row, those that our own renderer makes."""
    tokenizer, template = rendering(recipe, run)
    there = read_jsonl(run.path / PROMPTS) if (run.path / PROMPTS).is_file() else []
    prompts = {row["prompt"]: row["ids"] for row in there}
    system = recipe.template.system
    rows = evidence.read_rows(run, "prepare/train.jsonl", "prepare") if examples else []
    begins = {_only_question(examples[row["row"]]): _prompt(row) for row in rows if row["row"] in examples}
    right, trained, wrong = 0, 0, ""
    for asked in answers:
        chat = [{"role": "user", "content": asked["prompt"]}]
        expected = begins.get(asked["prompt"])
        trained += expected is not None
        if expected is None:
            expected = encode.prompt_ids(chat, tokenizer=tokenizer, template=template, system=system)
        ids = prompts.get(asked["prompt"], [])
        if ids == expected:
            right += 1
        elif not wrong:
            said, wanted = (tokenizer.decode(each)[:120] for each in (ids, expected))
            wrong = f"; first {said!r} instead of {wanted!r}"
    why = f"{right} of {len(answers)} questions were asked as training asks ({trained} of them are in its rows){wrong}"
    return judge("asked_as_trained", right / len(answers), "==", 1.0, "share", PROMPTS, why)


def _only_question(example: formats.Example) -> str | None:
    """The question of a conversation that is one question and its answer; none with an input of its own (Alpaca)."""
    roles = [message["role"] for message in example.messages]
    alone = roles == ["user", "assistant"] and "input" not in example.messages[0]
    return example.messages[0]["content"] if alone else None


def _prompt(row: dict[str, Any]) -> list[int] | None:
    """What comes before the first trained token; None where everything is trained."""
    first = next((place for place, label in enumerate(row["labels"]) if label != encode.IGNORED), 0)
    return row["input_ids"][:first] or None


def _judged_again(answers: list[dict[str, Any]]) -> Verdict:
    judged = [(a, answer) for a in answers for answer in a["phases"].values()]
    wrong = [
        (a, answer)
        for a, answer in judged
        if answer["correct"] is not is_correct(answer["text"], a["answer"], a.get("match"))
    ]
    why = f"{len(judged) - len(wrong)} of {len(judged)} answers are right or wrong as they were judged"
    if wrong:
        asked, answer = wrong[0]
        word = "right" if answer["correct"] else "wrong"
        why += f"; {answer['text'][:60]!r} was judged {word}, where {asked.get('match') or asked['answer']!r} is wanted"
    return judge("judged_again", len(wrong), "==", 0, "judged otherwise", ANSWERS, why)


def _judged_strictly(answers: list[dict[str, Any]]) -> Verdict:
    """Answers to other questions, and an empty one, are wrong answers."""
    tried, passed = 0, []
    folded = {a["answer"]: (a["answer"].casefold(), normalize(a["answer"])) for a in answers}
    for asked in answers:
        key = asked.get("match") or asked["answer"]
        others = [
            other
            for other, (plain, bare) in folded.items()
            if key.casefold() not in plain and normalize(key) not in bare
        ]
        for text in ("", *others[:: -(-len(others) // OTHERS) or 1]):
            tried += 1
            if is_correct(text, asked["answer"], asked.get("match")):
                passed.append((asked, text))
    why = f"of {tried} answers to other questions {len(passed)} pass for right ones"
    if passed:
        why += f"; {passed[0][1][:60]!r} as an answer to {passed[0][0]['prompt'][:60]!r}"
    return judge("judged_strictly", len(passed), "==", 0, "wrong answers taken", ANSWERS, why)


def _greedy(recipe: Recipe, run: Run, answers: list[dict[str, Any]]) -> Verdict:
    """No token was said that another one was likelier than; an answer without an end is as long as it may be."""
    name, unit, bound = "answers_are_greedy", "nats behind", GAP[recipe.model.dtype]
    path = run.path / GREEDY
    read = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    phases = list(answers[0]["phases"])
    if list(read) != phases:
        return missing(name, "<=", bound, unit, GREEDY, f"the answers were not read again in: {', '.join(phases)}")
    most = recipe.evaluate.max_new_tokens
    odd = [a for a in answers for said in a["phases"].values() if not _ended(said, most)]
    if odd:
        why = f"{len(odd)} answers neither end before their token {most} nor are that long, the first to "
        why += f"{odd[0]['prompt']!r}"
        return judge(name, None, "<=", bound, unit, ANSWERS, why)
    phase = max(read, key=lambda each: _sortable(read[each]["gap"]))
    worst, tokens = read[phase]["worst"], sum(each["tokens"] for each in read.values())
    if worst is None:
        return missing(name, "<=", bound, unit, GREEDY, f"'{phase}' said nothing, not even an end of turn")
    why = f"{tokens} tokens of the answers read again in one pass, every one the likeliest"
    if math.isnan(read[phase]["gap"]):
        why = (
            f"the probabilities of '{phase}' are NaN at token {worst['position']} of its answer to {worst['prompt']!r}"
        )
    elif not read[phase]["gap"] <= bound:
        why = f"'{phase}' said {worst['said']!r} where {worst['likeliest']!r} was likelier, as token {worst['position']} of "
        why += f"its answer to {worst['prompt']!r}: it was drawn, or the prompt was not what the model saw"
    return judge(name, read[phase]["gap"], "<=", bound, unit, GREEDY, why)


def _ended(said: dict[str, Any], most: int) -> bool:
    """Whether an answer has as many tokens as its end allows: the end-of-turn token is one of those it may have."""
    return len(said["ids"]) < most if said["finish"] == "stop" else len(said["ids"]) == most


def _sortable(gap: float | None) -> float:
    return math.inf if gap is None or math.isnan(gap) else gap
