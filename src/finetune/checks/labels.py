"""Is the loss on the answers, on all of them, and on nothing else? Read from the rows that training was given."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from finetune.backends import Tokenizer, get
from finetune.checks import Verdict, judge, missing
from finetune.checks.rows import rendering
from finetune.data import encode, formats, sources, templates
from finetune.data.encode import IGNORED
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Run, evidence

ROWS = "prepare/train.jsonl"
SEPARATOR = "\x1e"  # between the answers of one conversation


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    if not (run.path / ROWS).is_file():
        return [missing("labels", ">=", 1, "tokens", ROWS, "the prepared rows are not there")]
    rows = evidence.read_rows(run, ROWS, "prepare")
    if not rows:
        return [missing("labels", ">=", 1, "tokens", ROWS, "there is no prepared row")]
    tokenizer = get(recipe.backend).tokenizer(evidence.phases(run, recipe)["base"][0])
    trained = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    aligned = sum(
        all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        for row in rows
    )
    whole = [row for row in rows if not _cut(recipe, row)]
    ended = sum(_last_label(row["labels"]) in tokenizer.eos_ids for row in whole)
    return [
        judge(
            "trained_tokens", min(trained), ">=", 1, "tokens", ROWS,
            f"every one of {len(rows)} rows must train something; the poorest trains {min(trained)} tokens",
        ),
        judge(
            "labels_aligned", aligned / len(rows), "==", 1.0, "share", ROWS,
            "a label is the token at its own place or -100: neither shifted nor taken from another row",
        ),
        judge(
            "end_of_turn_trained", ended / len(whole) if whole else None, "==", 1.0, "share", ROWS,
            f"of {len(whole)} rows not cut short: the last label is an end-of-turn token, or the model never learns to stop",
        ),
        *_texts(recipe, rows, tokenizer, run),
    ]  # fmt: skip


def _cut(recipe: Recipe, row: dict[str, Any]) -> bool:
    """Whether truncation, asked for by the recipe, may have taken the end of this row."""
    asked = recipe.data is not None and recipe.data.on_overlong == "truncate"
    return asked and recipe.train is not None and len(row["input_ids"]) >= recipe.train.max_length


def _last_label(labels: list[int]) -> int | None:
    return next((label for label in reversed(labels) if label != IGNORED), None)


def _texts(recipe: Recipe, rows: list[dict[str, Any]], tokenizer: Tokenizer, run: Run) -> list[Verdict]:
    """Answers and prompts of the rows, against the data read again."""
    names = ("labels_are_answers", "prompts_as_served")
    if recipe.data is None or recipe.train is None:
        return [missing(name, "==", 1.0, "share", ROWS, "the recipe names no data") for name in names]
    try:
        examples = formats.to_examples(sources.read(recipe.data), recipe.data)
        return [_labels_are_answers(recipe, rows, tokenizer, examples), _prompts_as_served(recipe, run, rows, examples)]
    except FinetuneError as error:
        why = f"the data cannot be read again: {first_line(error)}"
        return [missing(name, "==", 1.0, "share", ROWS, why) for name in names]


def _labels_are_answers(
    recipe: Recipe, rows: list[dict[str, Any]], tokenizer: Tokenizer, examples: list[formats.Example]
) -> Verdict:
    """The trained tokens, decoded, against the answers in the data."""
    assert recipe.train is not None
    right, wrong = 0, ""
    for row in rows:
        said, number = _said(row, tokenizer), row["row"]
        wanted = _answers(examples[number], tokenizer) if number < len(examples) else None
        if wanted is not None and _same(said, wanted, recipe.train.completion_only_loss, _cut(recipe, row)):
            right += 1
        elif not wrong:
            wrong = f"; first at {row['file']}:{row['line']}: trains {said[:60]!r} instead of {str(wanted)[:60]!r}"
    why = f"rows whose trained tokens spell the answer in the data, no more and no less{wrong}"
    return judge("labels_are_answers", right / len(rows), "==", 1.0, "share", ROWS, why)


def _said(row: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The text of every stretch of trained tokens, joined as `_answers` joins."""
    stretches = [list(group) for trained, group in groupby(row["labels"], lambda label: label != IGNORED) if trained]
    return SEPARATOR.join(tokenizer.decode(stretch, skip_special=True).strip() for stretch in stretches)


def _answers(example: formats.Example, tokenizer: Tokenizer) -> str:
    """The text, or all answers; each as the tokenizer gives it back, which may normalize."""
    if example.kind == "text":
        texts = [example.text or ""]
    else:
        texts = [message["content"] for message in example.messages if message["role"] == "assistant"]
    return SEPARATOR.join(tokenizer.decode(tokenizer.encode(text), skip_special=True).strip() for text in texts)


def _same(said: str, wanted: str, completion_only: bool, truncated: bool) -> bool:
    if not completion_only:
        return all(answer in said for answer in wanted.split(SEPARATOR))
    return said == wanted or (truncated and bool(said) and wanted.startswith(said))


def _prompts_as_served(
    recipe: Recipe, run: Run, rows: list[dict[str, Any]], examples: list[formats.Example]
) -> Verdict:
    """A row begins with the very ids that the model is given when it is asked the same, and then answers."""
    tokenizer, template = rendering(recipe, run)
    right, wrong = 0, ""
    for row in rows:
        example = examples[row["row"]] if row["row"] < len(examples) else None
        prompt = _prompt(example, tokenizer, template, recipe.template.system) if example else None
        ids = row["input_ids"]
        if prompt is not None and ids[: len(prompt)] == prompt[: len(ids)] and not _goes_on(row, len(prompt)):
            right += 1
        elif not wrong:
            found, wanted = (tokenizer.decode(part[:60])[-160:] for part in (ids, prompt or []))
            wrong = f"; first at {row['file']}:{row['line']}: begins {found!r}, asked it is given {wanted!r}"
    why = f"rows whose answer follows the ids which the model is given when it is asked{wrong}"
    return judge("prompts_as_served", right / len(rows), "==", 1.0, "share", ROWS, why)


def _goes_on(row: dict[str, Any], place: int) -> bool:
    """Whether the prompt goes on where the answer should begin. A row that trains nothing has no answer."""
    rest = row["labels"][place:]
    return bool(rest) and rest[0] == IGNORED and any(label != IGNORED for label in row["labels"])


def _prompt(
    example: formats.Example, tokenizer: Tokenizer, template: templates.ChatTemplate, system: str | None
) -> list[int]:
    """Ids before the last answer; none for a text."""
    roles = [message["role"] for message in example.messages]
    if "assistant" not in roles:
        return []
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return encode.prompt_ids(example.messages[:last], tokenizer=tokenizer, template=template, system=system)
