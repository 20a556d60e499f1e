"""The shipped stories are what their writer makes, and fit for training a model from nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.cli.validate import faults_of
from finetune.data.formats import to_examples
from finetune.data.sources import SHIPPED, read
from finetune.recipe import load
from finetune.recipe.examples import example
from finetune.recipe.sections import Data
from support import stories

NAMES = {"train": stories.TRAIN, "heldout": stories.HELDOUT}


def texts(name: str) -> list[str]:
    return [row.values["text"] for row in read(Data(path=f"shipped:stories/{name}.jsonl"))]


def test_the_files_are_what_their_writer_makes(tmp_path):
    written = stories.write(tmp_path)
    assert {path.stem for path in (SHIPPED / "stories").glob("*.jsonl")} == set(NAMES)
    for name in NAMES:
        assert (SHIPPED / "stories" / f"{name}.jsonl").read_bytes() == (written / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_one_story_in_plain_words(name):
    data = Data(path=f"shipped:stories/{name}.jsonl")
    assert {each.kind for each in to_examples(read(data), data)} == {"text"}
    found = texts(name)
    assert len(found) == NAMES[name]
    for text in found:
        assert re.fullmatch(r"Once upon a time, [A-Za-z ,.!?\"]+[.!]", text), text
        assert 60 <= len(text.split()) <= 160 and "  " not in text and text.count('"') % 2 == 0
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text


def test_no_story_is_there_twice_and_none_is_held_out_that_was_trained():
    every = texts("train") + texts("heldout")
    assert len(set(every)) == len(every)


def test_plots_and_words_vary():
    words = [word for text in texts("train") for word in re.findall(r"[a-z]+", text.lower())]
    assert len(set(words)) > 380
    openings = {" ".join(text.split()[:12]) for text in texts("train")}
    assert len(openings) > 200


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in (SHIPPED / "stories").iterdir()) < 200_000


def test_the_recipe_trains_a_tiny_model_from_nothing_but_them():
    recipe = load(example("stories"))
    assert faults_of(recipe) == []
    assert recipe.model.path.startswith("tiny:llama?")
    assert recipe.train is not None and recipe.train.method == "full"
    assert recipe.data is not None and recipe.data.paths == ["shipped:stories/train.jsonl"]
    assert Path(recipe.evaluate.heldout or "").name == "heldout.jsonl"
