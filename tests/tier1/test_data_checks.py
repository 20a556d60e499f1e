"""Bad rows are found before training, each with file and line, and the recipe's policies are followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from finetune.core.errors import DataError
from finetune.data.checks import check, preferences, split
from finetune.data.encode import IGNORED, Encoded
from finetune.data.formats import Example
from finetune.data.templates import ChatTemplate
from finetune.recipe.sections import Data

EOS = 9


def row(line: int, prompt: list[int], answer: list[int]) -> Encoded:
    return Encoded([*prompt, *answer], [*[IGNORED] * len(prompt), *answer], line - 1, "rows.jsonl", line)


def run(*rows: Encoded, max_length: int = 10, **data: Any) -> tuple[list[Encoded], list[str]]:
    return check(list(rows), Data(path="rows.jsonl", **data), max_length, eos_ids=(EOS,))


def faults(*rows: Encoded, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        run(*rows, **options)
    return caught.value.faults


GOOD = row(1, [1, 2], [3, EOS])
LONG = row(2, [1, 2, 4], [5, 6, EOS])


def test_good_rows_pass_without_notes() -> None:
    rows = [GOOD, row(2, [1, 4], [3, EOS])]
    assert run(*rows) == (rows, [])


def test_an_over_long_row_is_a_fault_with_lengths_and_the_answer_lost() -> None:
    (fault,) = faults(GOOD, LONG, max_length=4)
    assert fault.startswith(
        "rows.jsonl:2: 6 tokens, over the limit of 4 (max_length); cutting it would lose 2 answer tokens"
    )


def test_a_row_of_just_the_limit_fits() -> None:
    assert run(LONG, max_length=6) == ([LONG], [])


def test_over_long_rows_are_dropped_with_a_note() -> None:
    kept, (note,) = run(GOOD, LONG, max_length=4, on_overlong="drop")
    assert kept == [GOOD]
    assert note == "1 row over 4 tokens dropped (first: rows.jsonl:2)"


def test_over_long_rows_are_cut_with_a_note_of_what_is_lost() -> None:
    kept, (note,) = run(GOOD, LONG, max_length=4, on_overlong="truncate")
    assert kept[1].input_ids == [1, 2, 4, 5]
    assert kept[1].lost_answer_tokens == 2
    assert "2 answer tokens lost with the end-of-turn token (first: rows.jsonl:2)" in note


def test_a_row_with_no_answer_left_after_cutting_is_a_fault() -> None:
    (fault,) = faults(GOOD, row(2, [1, 2, 4, 4], [5, EOS]), max_length=4, on_overlong="truncate")
    assert fault.startswith("rows.jsonl:2: 6 tokens, over the limit of 4")
    assert "no answer token is left" in fault


def test_a_row_without_trained_tokens_is_a_fault() -> None:
    assert faults(GOOD, row(2, [1, 2], [])) == ["rows.jsonl:2: no token is trained: the row has no answer"]


def test_a_row_whose_end_of_turn_is_not_trained_is_a_fault() -> None:
    (fault,) = faults(GOOD, row(2, [1], [3, 4]))
    assert fault.startswith("rows.jsonl:2: no end-of-turn token is trained")
    masked = Encoded([1, 3, EOS], [IGNORED, 3, IGNORED], 2, "rows.jsonl", 3)
    assert faults(GOOD, masked)[0].startswith("rows.jsonl:3: no end-of-turn token is trained")


def test_nothing_left_is_a_fault() -> None:
    assert faults(LONG, max_length=4, on_overlong="drop") == ["rows.jsonl: no row is left (of 1)"]
    assert faults() == ["rows.jsonl: no row is left (of 0)"]


AGAIN = row(3, [1, 2], [3, EOS])


def test_repeats_are_kept_with_a_note_dropped_or_refused() -> None:
    kept, (note,) = run(GOOD, AGAIN)
    assert kept == [GOOD, AGAIN]
    assert "1 repeated row kept (first: rows.jsonl:3 repeats rows.jsonl:1)" in note
    kept, (note,) = run(GOOD, AGAIN, on_duplicate="drop")
    assert kept == [GOOD]
    assert "1 repeated row dropped (first: rows.jsonl:3 repeats rows.jsonl:1)" in note
    assert faults(GOOD, AGAIN, row(4, [1, 2], [3, EOS]), on_duplicate="error") == [
        "rows.jsonl:3: repeats rows.jsonl:1",
        "rows.jsonl:4: repeats rows.jsonl:1",
    ]


def test_the_same_prompt_with_another_answer_is_noted() -> None:
    _, (note,) = run(GOOD, row(2, [1, 2], [4, EOS]), row(3, [1], [3, EOS]))
    assert "1 prompt answered in different ways (first: rows.jsonl:2 against rows.jsonl:1)" in note


def test_texts_without_a_prompt_do_not_contradict_each_other() -> None:
    assert run(row(1, [], [3, EOS]), row(2, [], [4, EOS]))[1] == []


def test_a_conversation_that_goes_on_differently_does_not_contradict() -> None:
    def two_turns(line: int, end: int) -> Encoded:
        ids = [1, 2, 3, EOS, 4, end, EOS]
        return Encoded(ids, [IGNORED, IGNORED, 3, EOS, IGNORED, end, EOS], line - 1, "rows.jsonl", line)

    assert run(two_turns(1, 5), two_turns(2, 6))[1] == []


def test_faults_of_every_kind_come_together() -> None:
    found = faults(GOOD, LONG, AGAIN, row(4, [1], []), max_length=4, on_duplicate="error")
    assert sorted(fault.split(": ")[0] for fault in found) == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4"]


def test_a_split_is_a_partition_repeatable_and_seeded() -> None:
    rows = [row(line, [line], [3, EOS]) for line in range(1, 41)]
    train, held = split(rows, 0.25, 7)
    assert (len(train), len(held)) == (30, 10)
    assert sorted([*train, *held], key=lambda each: each.line) == rows
    assert split(rows, 0.25, 7) == (train, held)
    assert split(rows, 0.25, 8)[1] != held


def test_a_split_holds_out_at_least_one_row_and_none_for_zero() -> None:
    rows = [row(line, [line], [3, EOS]) for line in range(1, 4)]
    assert len(split(rows, 0.01, 0)[1]) == 1
    assert split(rows, 0.0, 0) == (rows, [])


def test_copies_of_a_row_stay_on_one_side() -> None:
    rows = [row(line, [line // 2], [3, EOS]) for line in range(2, 42)]
    train, held = split(rows, 0.3, 1)
    assert not {each.input_ids[0] for each in train} & {each.input_ids[0] for each in held}
    assert held


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match="1 distinct row: none is left to train on"):
        split([GOOD, AGAIN], 0.5, 0)


class CharTokenizer:
    """One token a character; `.` ends a turn."""

    eos_token, bos_token, eos_ids, chat_template, vocab_size = ".", None, (ord("."),), None, 0x110000

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return "".join(map(chr, ids))


TEMPLATE = ChatTemplate(
    "plain", "{% for m in messages %}{{ m.content }}{{ '?' if m.role == 'user' else '.' }}{% endfor %}"
)


def pair(line: int, prompt: str, chosen: str, rejected: str) -> Example:
    return Example("preference", ({"role": "user", "content": prompt},), None, chosen, rejected, "pairs.jsonl", line)


def prefer(*pairs: Example, max_length: int = 10, **data: Any) -> tuple[list[dict[str, Any]], list[str]]:
    return preferences(
        pairs,
        Data(path="pairs.jsonl", **data),
        tokenizer=CharTokenizer(),
        template=TEMPLATE,
        system=None,
        max_length=max_length,
    )


def prefer_faults(*pairs: Example, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        prefer(*pairs, **options)
    return caught.value.faults


def test_good_pairs_pass_without_notes() -> None:
    kept, notes = prefer(pair(1, "q", "a", "b"), pair(2, "r", "a", "b"))
    assert [each["line"] for each in kept] == [1, 2]
    assert notes == []


def test_over_long_pairs_follow_the_policy() -> None:
    pairs = (pair(1, "q", "a", "b"), pair(2, "q", "a", "long answer"))
    assert prefer(*pairs, max_length=14)[1] == []
    assert prefer_faults(*pairs)[0].startswith("pairs.jsonl:2: 14 tokens, over the limit of 10 (max_length), 2 of the")
    kept, (note,) = prefer(*pairs, on_overlong="drop")
    assert [each["line"] for each in kept] == [1]
    assert "1 pair over 10 tokens dropped" in note
    kept, (note,) = prefer(*pairs, on_overlong="truncate")
    assert len(kept[1]["rejected_ids"]) == 8
    assert len(kept[1]["chosen_ids"]) == 2
    assert "1 pair cut to 10 tokens" in note


def test_a_pair_whose_prompt_leaves_no_room_is_a_fault() -> None:
    assert "11 of the prompt" in prefer_faults(pair(1, "q" * 10, "a", "b"), on_overlong="truncate")[0]


def test_pairs_that_contradict_each_other_are_a_fault() -> None:
    found = prefer_faults(pair(1, "q", "a", "b"), pair(2, "q", "c", "a"))
    assert found == ["pairs.jsonl:2 rejects the answer that pairs.jsonl:1 chooses"]


def test_repeated_pairs_follow_the_policy() -> None:
    pairs = (pair(1, "q", "a", "b"), pair(2, "q", "a", "b"))
    assert len(prefer(*pairs)[0]) == 2
    assert len(prefer(*pairs, on_duplicate="drop")[0]) == 1
    assert prefer_faults(*pairs, on_duplicate="error") == ["pairs.jsonl:2: repeats pairs.jsonl:1"]


def test_no_pairs_is_a_fault() -> None:
    assert prefer_faults() == ["pairs.jsonl: no pair is left (of 0)"]
