"""Is the loss on the answers, on all of them, and on nothing else? Read from the rows that training was given."""

from __future__ import annotations

from typing import Any

from finetune import evidence
from finetune.answers import normalize
from finetune.backends import Tokenizer, get
from finetune.checks import Verdict, judge, missing
from finetune.data import formats, sources
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Run

ROWS = "prepare/train.jsonl"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    if not (run.path / ROWS).is_file():
        return [missing("labels", ">=", 1, "tokens", ROWS, "the prepared rows are not there")]
    rows = evidence.read_rows(run, ROWS, "prepare")
    if not rows:
        return [missing("labels", ">=", 1, "tokens", ROWS, "there is no prepared row")]
    tokenizer = get(recipe.backend).tokenizer(evidence.phases(run, recipe)["base"][0])
    trained = [sum(label != -100 for label in row["labels"]) for row in rows]
    aligned = sum(
        all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
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
        _labels_are_answers(recipe, rows, tokenizer),
    ]  # fmt: skip


def _cut(recipe: Recipe, row: dict[str, Any]) -> bool:
    """Whether truncation, asked for by the recipe, may have taken the end of this row."""
    asked = recipe.data is not None and recipe.data.on_overlong == "truncate"
    return asked and recipe.train is not None and len(row["input_ids"]) >= recipe.train.max_length


def _last_label(labels: list[int]) -> int | None:
    return next((label for label in reversed(labels) if label != -100), None)


def _labels_are_answers(recipe: Recipe, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> Verdict:
    """The trained tokens, decoded, against the answers read again from the data file."""
    name, data, train = "labels_are_answers", recipe.data, recipe.train
    if data is None or train is None:
        return missing(name, "==", 1.0, "share", ROWS, "the recipe names no data")
    try:
        examples = formats.to_examples(sources.read(data), data)
    except FinetuneError as error:
        return missing(name, "==", 1.0, "share", ROWS, f"the data cannot be read again: {first_line(error)}")
    right, wrong = 0, ""
    for row in rows:
        labels, number = row["labels"], row["row"]
        said = _bare(tokenizer.decode([label for label in labels if label != -100], skip_special=True))
        wanted = _bare(_answer(examples[number])) if number < len(examples) else None
        if wanted is not None and _same(said, wanted, train.completion_only_loss, _cut(recipe, row)):
            right += 1
        elif not wrong:
            wrong = f"; first at {row['file']}:{row['line']}: trains {said[:60]!r} instead of {str(wanted)[:60]!r}"
    why = f"rows whose trained tokens spell the answer in the data, no more and no less{wrong}"
    return judge(name, right / len(rows), "==", 1.0, "share", ROWS, why)


def _bare(text: str) -> str:
    """Without spaces: between two answers of one conversation the tokens have none."""
    return normalize(text).replace(" ", "")


def _same(said: str, wanted: str, completion_only: bool, truncated: bool) -> bool:
    if not completion_only:
        return wanted in said
    return said == wanted or (truncated and bool(said) and wanted.startswith(said))


def _answer(example: formats.Example) -> str:
    if example.kind == "text":
        return example.text or ""
    return " ".join(message["content"] for message in example.messages if message["role"] == "assistant")
