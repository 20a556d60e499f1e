"""Rows become conversations, texts or preference pairs; whatever is wrong with them is said with file and line."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.core.errors import DataError, RecipeError
from finetune.data.formats import Example, to_examples
from finetune.data.sources import Row
from finetune.recipe.sections import Data

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def convert(*values: dict[str, Any], **data: Any) -> list[Example]:
    rows = [Row(each, "rows.jsonl", number) for number, each in enumerate(values, 1)]
    return to_examples(rows, Data(path="rows.jsonl", **data))


def faults(*values: dict[str, Any], **data: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        convert(*values, **data)
    return caught.value.faults


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "system": "S"}, [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [USER, ASSISTANT]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ASSISTANT]}, [USER, ASSISTANT]),
        ({"prompt": "Q", "completion": "A"}, [USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "Q", "response": "A", "id": 7}, [USER, ASSISTANT]),
        ({"question": "Q", "answer": "A"}, [USER, ASSISTANT]),
        ({"instruction": "Q", "output": "A"}, [USER, ASSISTANT]),
        ({"instruction": "Q", "input": "", "output": "A", "text": "Below is ..."}, [USER, ASSISTANT]),
        ({"instruction": "Q", "input": None, "output": "A", "system": "S"}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "Q", "completion": "A", "messages": None}, [USER, ASSISTANT]),
    ],
)
def test_conversations_are_told_from_their_columns(values: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert convert(values) == [Example("chat", tuple(messages), None, None, None, "rows.jsonl", 1)]


def test_an_instruction_with_input_is_joined_and_kept_apart() -> None:
    (example,) = convert({"instruction": "Translate.", "input": "Good day.", "output": "A"})
    assert example.messages[0] == {
        "role": "user",
        "content": "Translate.\n\nGood day.",
        "instruction": "Translate.",
        "input": "Good day.",
    }


def test_plain_text_is_plain_text() -> None:
    assert convert({"text": "Once."}) == [Example("text", (), "Once.", None, None, "rows.jsonl", 1)]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"question": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "B"}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "B"}]},
        {"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "B"}]},
    ],
)
def test_pairs_are_told_from_their_columns(values: dict[str, Any]) -> None:
    assert convert(values) == [Example("preference", (USER,), None, "A", "B", "rows.jsonl", 1)]


def test_fields_rename_columns() -> None:
    (example,) = convert({"ask": "Q", "reply": "A"}, fields={"prompt": "ask", "completion": "reply"})
    assert example.messages == (USER, ASSISTANT)


def test_named_fields_win_over_columns_that_happen_to_be_there() -> None:
    (example,) = convert({"prompt": "Q", "completion": "A", "body": "Once."}, fields={"text": "body"})
    assert (example.kind, example.text) == ("text", "Once.")


def test_an_explicit_format_wins_over_detection() -> None:
    (example,) = convert({"prompt": "Q", "completion": "A", "text": "Once."}, format="text")
    assert example.text == "Once."


def test_an_explicit_format_takes_its_aliases() -> None:
    assert convert({"question": "Q", "answer": "A"}, format="prompt_completion")[0].messages == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"promt": "Q", "completion": "A"}, "the columns are 'promt', 'completion'. Nearest: prompt_completion"),
        ({"promt": "Q", "completion": "A"}, "lacks 'prompt'"),
        ({"Text": "x"}, "Nearest: text (text)"),
        ({"prompt": "Q", "completion": "  "}, "'completion' is empty: there is nothing to learn"),
        ({"prompt": "", "completion": "A"}, "'prompt' is empty"),
        ({"prompt": "Q", "completion": 7}, "'completion' is a number, expected text"),
        ({"text": ""}, "'text' is empty"),
        ({"instruction": "Q", "input": ["x"], "output": "A"}, "'input' is a list, expected text"),
        ({"messages": "Q"}, "'messages' is text, expected a list of messages"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["Q"]}, "messages[0] is text, expected an object"),
        ({"messages": [{"content": "Q"}]}, "messages[0] has no 'role'; it has 'content'"),
        ({"messages": [{"role": "usr", "content": "Q"}, ASSISTANT]}, "unknown role 'usr'. Did you mean 'user'?"),
        ({"messages": [{"role": "tool", "content": "Q"}, ASSISTANT]}, "Allowed: system, user, assistant."),
        ({"messages": [{"role": "user", "content": None}, ASSISTANT]}, "messages[0]: the content is missing"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1]: the assistant message is empty"),
        ({"messages": [USER, ASSISTANT, USER]}, "'messages' ends with 'user', but must end with 'assistant'"),
        ({"messages": [SYSTEM]}, "ends with 'system', but must end with 'assistant'"),
        ({"messages": [ASSISTANT]}, "messages[0]: roles out of order: 'assistant' where 'user' belongs"),
        ({"messages": [SYSTEM, USER, USER, ASSISTANT]}, "messages[2]: roles out of order: 'user' where 'assistant'"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "messages[1]: roles out of order: 'system'"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "messages[1]: the key 'weight' is not supported"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "the key 'tool_calls' is not supported"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "A", "rejected": "B"}, "without a 'prompt' column it must be a list of messages"),
        ({"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]}, "answer different conversations"),
        ({"prompt": [USER, ASSISTANT], "chosen": "A", "rejected": "B"}, "must end with 'user'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_line_and_reason(values: dict[str, Any], expected: str) -> None:
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"} if "chosen" in values else {"prompt": "Q", "completion": "A"}
    (fault,) = faults(good, values)
    assert fault.startswith("rows.jsonl:2: ")
    assert expected in fault


def test_all_faults_are_collected_and_twenty_are_listed() -> None:
    found = faults(*({"prompt": "Q", "completion": ""} for _ in range(30)))
    assert [fault.split(": ")[0] for fault in found[:20]] == [f"rows.jsonl:{line}" for line in range(1, 21)]
    assert found[20:] == ["... and 10 more"]


def test_a_row_that_is_not_of_the_named_format_says_what_it_lacks() -> None:
    (fault,) = faults({"prompt": "Q", "output": "A"}, format="instruction")
    assert "not a row of the format 'instruction'" in fault
    assert "lacks 'instruction'" in fault


def test_pairs_and_answers_do_not_mix() -> None:
    (fault,) = faults({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert "rows.jsonl:2 is a preference pair, rows.jsonl:1 is not" in fault


def test_an_unknown_field_in_the_mapping_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="unknown field 'promt'. Did you mean 'prompt'?"):
        convert({"ask": "Q"}, fields={"promt": "ask"})


def test_a_mapped_column_that_is_not_there_is_named() -> None:
    (fault,) = faults({"ask": "Q", "reply": "A"}, fields={"prompt": "ask", "completion": "repyl"})
    assert (
        "no column 'repyl', which data.fields gives for 'completion'. Did you mean 'reply'? Columns: 'ask', 'reply'."
        in fault
    )
