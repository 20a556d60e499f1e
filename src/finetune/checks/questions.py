"""Were the questions all asked, as in training, answered greedily and judged strictly, and kept out of the training?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from finetune.checks import Part, Verdict, judge, leaks, rereading
from finetune.checks.asked import base_tokenizer, phases, sets
from finetune.checks.rows import rendering
from finetune.core.errors import StageError
from finetune.data import encode, formats, sources
from finetune.data.tokenizer import Tokenizer
from finetune.evaluation.answers import is_correct, normalize
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import Answer, Question
from finetune.run.records.trained import Row

ANSWERS, PROMPTS = layout.ANSWERS.path, layout.PROMPTS.path
OTHERS = 20  # answers to other questions that each question is tried with


def _leaked(recipe: Recipe, run: Run) -> list[Verdict]:
    return [leaks.nothing_leaked(recipe, leaks.trained(recipe, run))]


# -- asked -------------------------------------------------------------------------------------------------------------


def _all_asked(recipe: Recipe, run: Run) -> list[Verdict]:
    """Every question of every file, in every phase of the run."""
    wanted = [
        _question(which, number, row.values)
        for which in sets(recipe)
        for number, row in enumerate(sources.read_jsonl_objects(getattr(recipe.evaluate, which)), 1)
    ]
    there = phases(recipe)
    asked = [
        (a["set"], a["id"], a["kind"], a["prompt"], a["answer"], a["match"])
        for a in evidence.rows(run, layout.ANSWERS)
        if list(a["phases"]) == there
    ]
    left = list(asked)
    lost = [each for each in wanted if not _take(left, each)]
    why = f"{len(wanted) - len(lost)} of the {len(wanted)} questions in the files have an answer of {', '.join(there)}"
    if lost:
        why += f"; not asked: {len(lost)}, first {lost[0][3]!r} of {lost[0][0]}"
    if left:
        why += f"; asked, and in no file: {len(left)}, first {left[0][3]!r}"
    share = (len(wanted) - len(lost)) / (len(wanted) + len(left)) if wanted else None
    return [judge("every_question_asked", share, "==", 1.0, "share", ANSWERS, why)]


def _question(which: str, number: int, row: dict[str, Any]) -> tuple[Any, ...]:
    """A line of a file of questions, as it is asked; `number` stands for the name that it does not have."""
    kind = row.get("kind", "trained" if which == "probes" else which)
    return which, str(row.get("id", number)), kind, row.get("prompt"), row.get("answer"), row.get("match")


def _take(those: list[Any], each: Any) -> bool:
    if each not in those:
        return False
    those.remove(each)
    return True


def _asked_as_trained(recipe: Recipe, run: Run) -> list[Verdict]:
    """The ids that the model was given are those that a trained row of the same question begins with; of a question that
    is in no row, those that our own renderer makes."""
    answers, prompts = evidence.rows(run, layout.ANSWERS), evidence.rows(run, layout.PROMPTS)
    tokenizer, template = rendering(recipe, run)
    system = recipe.template.system
    begins = _beginnings(recipe, run)
    right, trained, wrong = 0, 0, ""
    for place, asked in enumerate(answers):
        chat = [{"role": "user", "content": asked["prompt"]}]
        expected = begins.get(asked["prompt"])
        trained += expected is not None
        if expected is None:
            expected = encode.prompt_ids(chat, tokenizer=tokenizer, template=template, system=system)
        kept = prompts[place] if place < len(prompts) else {"prompt": "", "ids": []}
        if (kept["prompt"], kept["ids"]) == (asked["prompt"], expected):
            right += 1
        elif not wrong:
            said, wanted = (tokenizer.decode(each)[:120] for each in (kept["ids"], expected))
            wrong = f"; first {said!r} instead of {wanted!r}"
    why = f"{right} of {len(answers)} questions were asked as training asks ({trained} of them are in its rows){wrong}"
    share = right / max(len(answers), len(prompts)) if answers else None
    return [judge("asked_as_trained", share, "==", 1.0, "share", PROMPTS, why)]


def _beginnings(recipe: Recipe, run: Run) -> dict[str | None, list[int] | None]:
    """By question, what a trained row of it begins with."""
    examples = leaks.trained(recipe, run)
    rows = evidence.rows(run, layout.TRAIN_ROWS) if examples else []
    return {_only_question(examples[row["row"]]): _prompt(row) for row in rows if row["row"] in examples}


def _only_question(example: formats.Example) -> str | None:
    """The question of a conversation that is one question and its answer; none with an input of its own (Alpaca)."""
    roles = [message["role"] for message in example.messages]
    alone = roles == ["user", "assistant"] and "input" not in example.messages[0]
    return example.messages[0]["content"] if alone else None


def _prompt(row: Row) -> list[int] | None:
    """What comes before the first trained token; None where everything is trained."""
    first = next((place for place, label in enumerate(row["labels"]) if label != encode.IGNORED), 0)
    return row["input_ids"][:first] or None


# -- judged ------------------------------------------------------------------------------------------------------------


def _answers(recipe: Recipe, run: Run) -> list[Verdict]:
    answers = evidence.rows(run, layout.ANSWERS)
    if not answers:
        raise StageError("no question was asked")
    tokenizer = base_tokenizer(recipe, run)
    return [_text_of_tokens(tokenizer, answers), _judged_again(answers), _judged_strictly(answers)]


def _text_of_tokens(tokenizer: Tokenizer, answers: list[Question]) -> Verdict:
    """What is judged is the text of the tokens that were said."""
    said = [(asked, answer) for asked in answers for answer in asked["phases"].values()]
    odd = [(asked, answer) for asked, answer in said if not _is_text(tokenizer, answer)]
    why = f"{len(said) - len(odd)} of {len(said)} answers are the text of their tokens"
    if odd:
        asked, answer = odd[0]
        why += f"; that to {asked['prompt']!r} is {answer['text'][:60]!r}, and its tokens say "
        why += f"{tokenizer.decode(answer['ids'])[:60]!r}"
    return judge("answers_as_said", len(odd), "==", 0, "answers of other text", ANSWERS, why)


def _is_text(tokenizer: Tokenizer, answer: Answer) -> bool:
    return answer["text"] in (tokenizer.decode(answer["ids"]), tokenizer.decode(answer["ids"], skip_special=True))


def _judged_again(answers: list[Question]) -> Verdict:
    judged = [(asked, answer) for asked in answers for answer in asked["phases"].values()]
    wrong = [
        (asked, answer)
        for asked, answer in judged
        if answer["correct"] is not is_correct(answer["text"], asked["answer"], asked["match"])
    ]
    why = f"{len(judged) - len(wrong)} of {len(judged)} answers are right or wrong as they were judged"
    if wrong:
        asked, answer = wrong[0]
        word = "right" if answer["correct"] else "wrong"
        why += f"; {answer['text'][:60]!r} was judged {word}, where {asked['match'] or asked['answer']!r} is wanted"
    return judge("judged_again", len(wrong), "==", 0, "judged otherwise", ANSWERS, why)


def _judged_strictly(answers: list[Question]) -> Verdict:
    """Answers to other questions, and an empty one, are wrong answers."""
    tried, passed = 0, []
    folded = {a["answer"]: (a["answer"].casefold(), normalize(a["answer"])) for a in answers}
    for asked in answers:
        key = asked["match"] or asked["answer"]
        others = [
            other
            for other, (plain, bare) in folded.items()
            if key.casefold() not in plain and normalize(key) not in bare
        ]
        for text in ("", *others[:: -(-len(others) // OTHERS) or 1]):
            tried += 1
            if is_correct(text, asked["answer"], asked["match"]):
                passed.append((asked, text))
    why = f"of {tried} answers to other questions {len(passed)} pass for right ones"
    if passed:
        why += f"; {passed[0][1][:60]!r} as an answer to {passed[0][0]['prompt'][:60]!r}"
    return judge("judged_strictly", len(passed), "==", 0, "wrong answers taken", ANSWERS, why)


def _owes(*names: str) -> Callable[[Recipe], Iterable[str]]:
    def owed(recipe: Recipe) -> Iterable[str]:
        return names if sets(recipe) else ()

    return owed


PARTS: tuple[Part, ...] = (
    Part(check=_leaked, owes=lambda recipe: ["nothing_leaked"], evidence=leaks.EVIDENCE),
    Part(check=_all_asked, owes=_owes("every_question_asked"), evidence=ANSWERS),
    Part(check=_asked_as_trained, owes=_owes("asked_as_trained"), evidence=PROMPTS),
    Part(check=_answers, owes=_owes("answers_as_said", "judged_again", "judged_strictly"), evidence=ANSWERS),
    *rereading.PARTS,
)
