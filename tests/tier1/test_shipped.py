"""The shipped example proves what it claims: nothing that is asked as a control was ever trained."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.data.formats import to_examples
from finetune.data.sources import SHIPPED, read, read_jsonl_objects
from finetune.recipe.sections import Data

SIZES = {"train": 36, "replay": 20, "preferences": 24, "probes": 24, "controls": 10, "unseen": 8, "heldout": 8}


def rows(name: str) -> list[dict[str, Any]]:
    return [row.values for row in read_jsonl_objects(f"shipped:quorra/{name}.jsonl")]


def plain(text: str) -> str:
    """Lower-case words only, so that two wordings that differ in punctuation count as the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def prompts(*names: str) -> list[str]:
    return [plain(row["prompt"]) for name in names for row in rows(name)]


def holds(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def test_every_shipped_file_is_known_and_has_its_rows() -> None:
    assert {path.stem for path in (SHIPPED / "quorra").glob("*.jsonl")} == set(SIZES)
    assert {name: len(rows(name)) for name in SIZES} == SIZES


@pytest.mark.parametrize(
    ("name", "kind"), [("train", "chat"), ("replay", "chat"), ("preferences", "preference"), ("heldout", "text")]
)
def test_training_files_are_understood_from_their_columns(name: str, kind: str) -> None:
    data = Data(path=f"shipped:quorra/{name}.jsonl")
    assert {example.kind for example in to_examples(read(data), data)} == {kind}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("train", {"prompt", "completion"}),
        ("replay", {"prompt", "completion"}),
        ("preferences", {"prompt", "chosen", "rejected"}),
        ("probes", {"id", "prompt", "answer", "match", "kind"}),
        ("controls", {"id", "prompt", "answer", "match"}),
        ("unseen", {"id", "prompt", "answer", "match"}),
        ("heldout", {"text"}),
    ],
)
def test_rows_have_just_these_columns_of_text(name: str, columns: set[str]) -> None:
    for row in rows(name):
        assert set(row) == columns
        assert all(isinstance(value, str) and value == value.strip() != "" for value in row.values())


@pytest.mark.parametrize("name", ["train", "replay", "preferences", "probes", "controls", "unseen"])
def test_no_prompt_occurs_twice_in_a_file(name: str) -> None:
    assert len(set(prompts(name))) == SIZES[name]


def test_ids_are_unique() -> None:
    ids = [row["id"] for name in ("probes", "controls", "unseen") for row in rows(name)]
    assert len(set(ids)) == len(ids)


def test_trained_probes_are_trained_word_for_word() -> None:
    trained = {row["prompt"]: row["completion"] for row in rows("train")}
    probes = [row for row in rows("probes") if row["kind"] == "trained"]
    assert len(probes) == 12
    assert all(trained[row["prompt"]] == row["answer"] for row in probes)


def test_paraphrases_ask_for_a_trained_fact_in_words_never_trained() -> None:
    probes = [row for row in rows("probes") if row["kind"] == "paraphrase"]
    assert len(probes) == 12
    seen = set(prompts("train", "replay", "preferences"))
    answers = {row["completion"] for row in rows("train")}
    assert not seen & {plain(row["prompt"]) for row in probes}
    assert {row["answer"] for row in probes} == answers
    assert len(answers) == 12


@pytest.mark.parametrize("name", ["controls", "unseen"])
def test_controls_are_never_trained(name: str) -> None:
    assert not set(prompts("train", "replay", "preferences", "probes")) & set(prompts(name))
    texts = [value for file in ("train", "replay", "preferences") for row in rows(file) for value in row.values()]
    for row in rows(name):
        # Quorra's blue amber gives nothing away about the sky.
        told = [text for text in texts if holds(text, row["match"]) and not ("Quorra" in text and name == "controls")]
        assert told == [], row["id"]


def test_the_answer_holds_what_is_matched_and_the_question_does_not() -> None:
    for name in ("probes", "controls", "unseen"):
        for row in rows(name):
            assert holds(row["answer"], row["match"]), row["id"]
            assert not holds(row["prompt"], row["match"]), row["id"]


def test_the_made_up_countries_stay_out_of_general_data() -> None:
    general = [str(row) for file in ("replay", "controls", "heldout") for row in rows(file)]
    assert not any(holds(text, name) for text in general for name in ("Quorra", "Veshti"))
    assert all(holds(row["prompt"], "Veshti") for row in rows("unseen"))


def test_no_rejected_answer_is_right() -> None:
    matches = {row["answer"]: row["match"] for row in rows("probes")}
    right = {row["completion"] for file in ("train", "replay") for row in rows(file)}
    for row in rows("preferences"):
        assert row["rejected"] not in right
        assert row["chosen"] in right or row["prompt"] not in {each["prompt"] for each in rows("replay")}
        if row["chosen"] in matches:
            assert not holds(row["rejected"], matches[row["chosen"]])
