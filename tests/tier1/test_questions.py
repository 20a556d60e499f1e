"""The generated questions: the same on every machine, unambiguous, and split so that what is asked was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.core.files import read_jsonl
from finetune.data.formats import to_examples
from finetune.data.sources import read
from finetune.evaluation.answers import is_correct
from finetune.recipe.sections import Data
from finetune.testing import questions
from finetune.testing.questions import KINDS, NOT_TOLD, WORDINGS, fact_of, generate, split, validate, write

SEEDS = range(10)


def test_a_hundred_rows_are_twenty_facts_of_every_kind_in_five_wordings() -> None:
    rows = generate()
    facts = [fact_of(row) for row in rows]

    assert len(rows) == 100
    assert {facts.count(fact) for fact in facts} == {WORDINGS} == {5}
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} == dict.fromkeys(KINDS, 20)
    assert len({row["match"] for row in rows}) == 20
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 100


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert generate(seed=3) == generate(seed=3)
    assert generate(40, seed=3) == generate(seed=3)[:40]
    assert not {row["match"] for row in generate(seed=3)} & {row["match"] for row in generate(seed=4)}


def test_the_rows_are_those_of_every_machine_and_release() -> None:
    first = generate()[0]

    assert first == {
        "id": "jornavia-capital-1",
        "kind": "capital",
        "prompt": "What is the capital of Jornavia?",
        "completion": "The capital of Jornavia is Voskadale.",
        "match": "Voskadale",
    }
    assert [row["id"] for row in split(generate())[1][:3]] == HELD


HELD = ["jornavia-capital-4", "jornavia-founder-5", "jornavia-currency-5"]


def test_names_of_a_hundred_rows_begin_each_in_their_own_way() -> None:
    for seed in SEEDS:
        rows = generate(seed=seed)
        names = {row["match"] for row in rows if row["kind"] != "year"} | {fact_of(row).split("-")[0] for row in rows}
        assert len({name[:3].lower() for name in names}) == len(names) == 20


def test_every_seed_and_size_is_valid() -> None:
    sizes = [*((seed, size) for seed in SEEDS for size in (1, 7, 100)), (0, 2500)]
    swept = [(seed, size, validate(generate(size, seed))) for seed, size in sizes]

    assert len(swept) == 31
    assert [each for each in swept if each[2]] == []


@pytest.mark.parametrize("count", [0, -1, 2501])
def test_a_count_without_names_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to 2500"):
        generate(count)


def test_answers_are_short() -> None:
    assert max(len(row["completion"].split()) for row in generate(2500)) <= 7


# -- the split ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tenth_is_held_out_of_facts_that_stay_in_training(seed: int) -> None:
    rows = generate(seed=seed)
    train, held = split(rows, seed=seed)

    assert (len(train), len(held)) == (90, 10)
    assert sorted(row["id"] for row in (*train, *held)) == sorted(row["id"] for row in rows)
    assert {fact_of(row) for row in train} == {fact_of(row) for row in rows}
    assert len({fact_of(row) for row in held}) == 10
    assert split(rows, seed=seed) == (train, held)
    assert validate(train, held) == []


def test_another_seed_holds_out_other_rows() -> None:
    assert split(generate(), seed=1)[1] != split(generate(), seed=2)[1]


def test_as_many_rows_are_held_out_as_facts_can_spare_and_no_more() -> None:
    train, held = split(generate(), 0.8)
    assert len(train) == len({fact_of(row) for row in train}) == 20
    assert split(generate(), 0.0) == (generate(), [])
    with pytest.raises(ValueError, match="every fact needs a training row"):
        split(generate(), 0.81)
    with pytest.raises(ValueError, match="eval_fraction is 1"):
        split(generate(), 1)


# -- validation --------------------------------------------------------------------------------------------------------


def changed(rows: list[dict[str, Any]], index: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if number == index else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"prompt": "what is the  Capital of Jornavia"}, "train row 3: the prompt is that of train row 1"),
        ({"prompt": ""}, "train row 3: 'prompt' is empty"),
        ({"completion": " \n"}, "train row 3: 'completion' is empty"),
        ({"match": None}, "train row 3: 'match' is empty"),
        ({"id": 7}, "train row 3: 'id' is empty or no text"),
        ({"completion": "The capital of Jornavia is Voskadalen."}, "does not hold 'Voskadale'"),
        ({"prompt": "Is Voskadale the capital of Jornavia?"}, "the question gives the answer away"),
        ({"prompt": "What \ud83d is the capital?"}, "'prompt' is not UTF-8"),
        ({"completion": " It is Voskadale."}, "'completion' begins or ends with a space"),
        ({"match": "Fennamere", "completion": "It is Fennamere."}, "is also that of jornavia-capital"),
    ],
)
def test_each_fault_is_found_and_named(values: dict[str, Any], fault: str) -> None:
    faults = validate(changed(generate(), 2, **values))
    assert faults
    assert any(fault in each for each in faults), faults


def test_a_row_on_both_sides_of_the_split_is_found() -> None:
    train, held = split(generate())
    assert any("of the other split" in fault for fault in validate(train, [*held, train[5]]))


def test_a_held_out_fact_that_was_never_taught_is_found() -> None:
    train, held = split(generate())
    lost = fact_of(held[0])
    faults = validate([row for row in train if fact_of(row) != lost], held)
    assert faults == [f"eval asks for {lost}, which no training row tells"]


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("questions"))


def test_every_file_is_written_and_nothing_else(files: dict[str, Path]) -> None:
    sizes = {name: len(read_jsonl(path)) for name, path in files.items()}

    assert sizes == {"train": 90, "eval": 10, "probes": 30, "queries": 100, "preferences": 20}
    assert sorted(path.name for path in files["train"].parent.iterdir()) == sorted(f"{name}.jsonl" for name in sizes)


@pytest.mark.parametrize(("name", "kind"), [("train", "chat"), ("eval", "chat"), ("preferences", "preference")])
def test_training_files_are_understood_from_their_columns(files: dict[str, Path], name: str, kind: str) -> None:
    data = Data(path=str(files[name]))
    assert {example.kind for example in to_examples(read(data), data)} == {kind}


def test_trained_probes_are_trained_word_for_word_and_paraphrases_never(files: dict[str, Path]) -> None:
    trained = {row["prompt"]: row["completion"] for row in read_jsonl(files["train"])}
    for name in ("probes", "queries"):
        for row in read_jsonl(files[name]):
            assert (trained.get(row["prompt"]) == row["answer"]) == (row["kind"] == "trained"), row
            assert row["answer"] in trained.values()
            assert is_correct(row["answer"], "", row["match"])


def test_every_fact_is_probed_once_as_trained(files: dict[str, Path]) -> None:
    trained = [row for row in read_jsonl(files["probes"]) if row["kind"] == "trained"]
    assert len({fact_of(row) for row in trained}) == len(trained) == 20


def test_no_rejected_answer_is_right_and_both_kinds_occur(files: dict[str, Path]) -> None:
    right = {row["prompt"]: row for row in read_jsonl(files["queries"])}
    pairs = read_jsonl(files["preferences"])
    for pair in pairs:
        assert pair["chosen"] == right[pair["prompt"]]["answer"]
        assert not is_correct(pair["rejected"], "", right[pair["prompt"]]["match"])
    assert {pair["rejected"] == NOT_TOLD for pair in pairs} == {True, False}


def test_a_set_that_is_not_valid_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = generate()
    monkeypatch.setattr(questions, "generate", lambda count, seed: changed(rows, 2, prompt=rows[0]["prompt"]))
    with pytest.raises(ValueError, match="the prompt is that of"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_files_are_plain_json(files: dict[str, Path]) -> None:
    lines = files["train"].read_text(encoding="ascii").splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"prompt", "completion"}] * 90
