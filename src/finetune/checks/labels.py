"""Is the loss on the answers, on all of them, and on nothing else? Read from the rows that training was given."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from finetune.backends import tokenizer_of
from finetune.checks import Verdict, judge
from finetune.checks.parts import several, single
from finetune.checks.rows import examples_again, labelled, rendering
from finetune.core.errors import StageError
from finetune.data import encode, formats, templates
from finetune.data.encode import IGNORED
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.trained import Row

ROWS = layout.TRAIN_ROWS.path
MARKED = ("trained_tokens", "labels_aligned", "end_of_turn_trained")
SEPARATOR = "\x1e"  # between the answers of one conversation


def _marked(recipe: Recipe, run: Run) -> list[Verdict]:
    """Which tokens carry a label."""
    rows = _rows(run)
    tokenizer = tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))
    trained = [labelled(row) for row in rows]
    aligned = sum(
        all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        for row in rows
    )
    whole = [row for row in rows if not _cut(recipe, row)]
    ended = sum(_last_label(row["labels"]) in tokenizer.eos_ids for row in whole)
    return [
        judge(
            MARKED[0], min(trained), ">=", 1, "tokens", ROWS,
            f"every one of {len(rows)} rows must train something; the poorest trains {min(trained)} tokens",
        ),
        judge(
            MARKED[1], aligned / len(rows), "==", 1.0, "share", ROWS,
            "a label is the token at its own place or -100: neither shifted nor taken from another row",
        ),
        judge(
            MARKED[2], ended / len(whole) if whole else None, "==", 1.0, "share", ROWS,
            f"of {len(whole)} rows not cut short: the last label is an end-of-turn token, or the model never learns to stop",
        ),
    ]  # fmt: skip


def _rows(run: Run) -> list[Row]:
    """The prepared rows, some."""
    rows = evidence.rows(run, layout.TRAIN_ROWS)
    if not rows:
        raise StageError("there is no prepared row")
    return rows


def _cut(recipe: Recipe, row: Row) -> bool:
    """Whether truncation, asked for by the recipe, may have taken the end of this row."""
    asked = recipe.data is not None and recipe.data.on_overlong == "truncate"
    return asked and recipe.train is not None and len(row["input_ids"]) >= recipe.train.max_length


def _last_label(labels: list[int]) -> int | None:
    return next((label for label in reversed(labels) if label != IGNORED), None)


def _labels_are_answers(recipe: Recipe, run: Run) -> Verdict:
    """The trained tokens, decoded, against the answers in the data, read again."""
    assert recipe.train is not None
    rows, examples = _rows(run), examples_again(recipe.data)
    tokenizer = tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))
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


def _said(row: Row, tokenizer: Tokenizer) -> str:
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


def _prompts_as_served(recipe: Recipe, run: Run) -> Verdict:
    """A row begins with the very ids that the model is given when it is asked the same, and then answers."""
    rows, examples = _rows(run), examples_again(recipe.data)
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


def _goes_on(row: Row, place: int) -> bool:
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


PARTS = (
    several(MARKED, _marked, ROWS),
    single("labels_are_answers", _labels_are_answers, ROWS),
    single("prompts_as_served", _prompts_as_served, ROWS),
)
