"""What goes wrong with the data on its way into training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.files import change_rows
from sabotage.targets import ENCODE_SFT, SFT_COLLATE

MASKED = -100


@sabotage("loss on the prompt too", imitates="https://github.com/MakazhanAlpamys/Soup/issues/683", fast=True)
def loss_on_the_prompt(context: Context) -> None:
    """The trainer takes every token for a label, though the prepared rows mask the prompts."""
    _collated(context, lambda row: {**row, "labels": list(row["input_ids"])})


@sabotage("labels shifted once too often")
def labels_shifted(context: Context) -> None:
    """Every label stands one place too far to the left, as where both the data and the model shift."""
    _collated(context, lambda row: {**row, "labels": [*list(row["labels"])[1:], MASKED]})


@sabotage("end-of-turn token masked", imitates="https://github.com/huggingface/trl/issues/1623", fast=True)
def end_of_turn_masked(context: Context) -> None:
    """The token that ends an answer carries no label, as where it is also the padding."""

    def masked(row: dict[str, Any]) -> dict[str, Any]:
        last = max(place for place, label in enumerate(row["labels"]) if label != MASKED)
        return {**row, "labels": [*row["labels"][:last], MASKED, *row["labels"][last + 1 :]]}

    change_rows(context, lambda rows: [masked(row) for row in rows])


@sabotage("nothing left to train", imitates="https://github.com/huggingface/trl/issues/6668")
def nothing_left_to_train(context: Context) -> None:
    """Every label of every row is masked."""
    change_rows(context, lambda rows: [{**row, "labels": [MASKED] * len(row["labels"])} for row in rows])


@sabotage("answers cut off", imitates="https://github.com/huggingface/transformers/issues/30998")
def answers_cut_off(context: Context) -> None:
    """Rows are truncated so that half of each answer is gone."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
        most = first + (len(row["labels"]) - first) // 2
        return {**row, "input_ids": row["input_ids"][:most], "labels": row["labels"][:most]}

    change_rows(context, lambda rows: [cut(row) for row in rows])


@sabotage("answers of other questions")
def answers_shuffled(context: Context) -> None:
    """The trainer gets each prompt with the answer of the row before it."""

    def rotated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = [_parts(row) for row in rows]
        return [
            {**row, "input_ids": prompt + answer, "labels": [MASKED] * len(prompt) + answer}
            for row, (prompt, _), (_, answer) in zip(rows, parts, [parts[-1], *parts[:-1]], strict=True)
        ]

    change_rows(context, rotated)


@sabotage("one example again and again")
def one_example(context: Context) -> None:
    """Every prepared row is the first one."""
    change_rows(context, lambda rows: [{**rows[0], "row": row["row"]} for row in rows])


@sabotage("half of the data dropped")
def half_of_the_data(context: Context) -> None:
    """Every other prepared row is missing."""
    change_rows(context, lambda rows: rows[::2])


@sabotage("half of each batch thrown away")
def half_of_each_batch(context: Context) -> None:
    """The collator keeps every other row of a batch."""

    context.wrap(SFT_COLLATE, lambda original, self, examples, *a, **more: original(self, examples[::2], *a, **more))


@sabotage("truncated in the collator", imitates="https://github.com/huggingface/transformers/issues/30998")
def truncated_in_the_collator(context: Context) -> None:
    """Rows are cut to 24 tokens on their way into a batch, as by a default nobody set."""
    _collated(
        context, lambda row: {key: value[:24] if isinstance(value, list) else value for key, value in row.items()}
    )


@sabotage("padding trained")
def padding_trained(context: Context) -> None:
    """The padding carries labels, so that the model learns to go on with it."""

    def collate(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        batch = original(self, *arguments, **more)
        batch["labels"] = batch["labels"].where(batch["attention_mask"].bool(), batch["input_ids"])
        return batch

    context.wrap(SFT_COLLATE, collate)


@sabotage("mask the wrong way round")
def mask_inverted(context: Context) -> None:
    """The prompts carry the labels, and the answers carry none."""

    def inverted(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        return {**row, "labels": [token if label == MASKED else MASKED for token, label in pairs]}

    change_rows(context, lambda rows: [inverted(row) for row in rows])


@sabotage("first word of the answers masked")
def first_token_masked(context: Context) -> None:
    """The mask is one token too long, so that the first token of an answer is never trained."""

    def masked(row: dict[str, Any]) -> dict[str, Any]:
        first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
        return {**row, "labels": [*row["labels"][:first], MASKED, *row["labels"][first + 1 :]]}

    change_rows(context, lambda rows: [masked(row) for row in rows])


@sabotage("role marker trained as answer")
def role_marker_trained(context: Context) -> None:
    """The mask is too short: the marker that begins the assistant's turn carries labels."""

    def longer(row: dict[str, Any]) -> dict[str, Any]:
        first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
        return {
            **row,
            "labels": row["labels"][: first - 2] + row["input_ids"][first - 2 : first] + row["labels"][first:],
        }

    change_rows(context, lambda rows: [longer(row) for row in rows])


@sabotage("prompts rendered twice")
def prompts_twice(context: Context) -> None:
    """The chat template is applied to what it had rendered already."""

    def doubled(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = _parts(row)
        return {**row, "input_ids": prompt * 2 + answer, "labels": [MASKED] * len(prompt) * 2 + answer}

    change_rows(context, lambda rows: [doubled(row) for row in rows])


@sabotage("trained with another template", imitates="https://github.com/hiyouga/LlamaFactory/issues/2509")
def another_template(context: Context) -> None:
    """Rows are rendered as Alpaca writes them, while the run keeps and uses ChatML."""

    def encode(original: Any, example: Any, row: int, *, template: Any, **more: Any) -> Any:
        from dataclasses import replace

        from finetune.data.templates import choose
        from finetune.recipe.sections import Template

        other = choose(Template(name="alpaca"), more["tokenizer"])
        return original(example, row, template=replace(template, source=other.source), **more)

    context.wrap(ENCODE_SFT, encode)


@sabotage("answers in lower case")
def answers_lower(context: Context) -> None:
    """A cleaning step turns every answer into lower case."""
    _answers(context, str.lower)


@sabotage("white space lost in the answers")
def answers_without_spaces(context: Context) -> None:
    """A cleaning step takes the white space out of every answer."""
    _answers(context, lambda text: text.replace(" ", ""))


def _answers(context: Context, change: Callable[[str], str]) -> None:
    """Change the answers between reading and rendering."""

    def encode(original: Any, example: Any, row: int, **more: Any) -> Any:
        from dataclasses import replace

        messages = tuple(
            {**each, "content": change(each["content"])} if each["role"] == "assistant" else each
            for each in example.messages
        )
        return original(replace(example, messages=messages), row, **more)

    context.wrap(ENCODE_SFT, encode)


@sabotage("rows of an older data set")
def older_data(context: Context) -> None:
    """A cache gives the rows in the order that an older file had."""
    change_rows(
        context, lambda rows: [{**older, "row": row["row"]} for row, older in zip(rows, _older(rows), strict=True)]
    )


def _older(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in the order of another day."""
    return [*rows[1:], rows[0]]


@sabotage("begin token in front of every row", imitates="https://github.com/MakazhanAlpamys/Soup/issues/781")
def begin_token_added(context: Context) -> None:
    """Training rows begin with a token that no prompt begins with later."""
    change_rows(
        context,
        lambda rows: [{**row, "input_ids": [0, *row["input_ids"]], "labels": [MASKED, *row["labels"]]} for row in rows],
    )


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt's ids and the answer's."""
    first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
    return row["input_ids"][:first], row["input_ids"][first:]


def _collated(context: Context, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change every row on its way into a batch."""

    context.wrap(
        SFT_COLLATE,
        lambda original, self, examples, *a, **more: original(self, [change(row) for row in examples], *a, **more),
    )
