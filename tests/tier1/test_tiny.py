"""Tiny models by name: what a name may say, and that one is made once for everything that went into it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from finetune.cli.validate import faults_of, model_kind
from finetune.core.errors import UsageError
from finetune.core.files import write_jsonl
from finetune.export.card import base_name
from finetune.models import sources, tiny
from finetune.recipe import load_mapping
from finetune.recipe.sections import Data, Model
from finetune.run import Run
from finetune.run.plan import BY_NAME
from finetune.stages.runner import fingerprint
from finetune.training import estimate

STORIES = "tiny:llama?hidden_size=128&num_hidden_layers=3&vocab_size=1000"


def recipe(name: str, **data: str):
    return load_mapping({"model": name, "data": {"path": "shipped:quorra/train.jsonl", **data}})


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The calls of `tiny.make`, which makes no model here, with an empty cache and libraries that need not be there."""
    calls = []

    def make(directory: Path, architecture: str, **options) -> Path:
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": architecture}))
        calls.append(options)
        return directory

    monkeypatch.setattr(tiny, "make", make)
    monkeypatch.setattr(sources, "version", lambda package: "1.0" if package != "pip" else version(package))
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    return calls


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_bare_name_takes_the_sizes_of_its_architecture():
    assert len(tiny.ARCHITECTURES) >= 9
    for architecture, sizes in tiny.ARCHITECTURES.items():
        wanted = tiny.parse(f"tiny:{architecture}")
        assert (wanted.architecture, wanted.values, wanted.vocab_size, wanted.seed) == (architecture, sizes, 512, 0)


def test_options_change_sizes_and_nothing_else():
    wanted = tiny.parse(f"{STORIES}&tie_word_embeddings=false&seed=7")
    changed = {"hidden_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": False}
    assert wanted.values == {**tiny.ARCHITECTURES["llama"], **changed}
    assert (wanted.vocab_size, wanted.seed) == (1000, 7)
    assert tiny.ARCHITECTURES["llama"]["hidden_size"] == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny:lama", "unknown architecture 'lama'. Did you mean 'llama'? Known: llama, gpt2"),
        ("tiny:", "unknown architecture ''"),
        ("tiny:llama?hiden_size=8", "unknown option 'hiden_size'. Did you mean 'hidden_size'?"),
        ("tiny:gpt2?hidden_size=8", "unknown option 'hidden_size'. Known: n_embd"),
        ("tiny:llama?hidden_size=big", "'hidden_size' must be a whole number from 1 on, not 'big'"),
        ("tiny:llama?hidden_size=", "'hidden_size' must be a whole number from 1 on, not ''"),
        ("tiny:llama?num_hidden_layers=0", "from 1 on, not '0'"),
        ("tiny:llama?vocab_size=200", "'vocab_size' must be a whole number from 259 on"),
        ("tiny:llama?tie_word_embeddings=1", "'tie_word_embeddings' must be true or false, not '1'"),
    ],
)
def test_a_wrong_name_is_a_fault_of_the_recipe_with_what_is_allowed(name, said):
    with pytest.raises(UsageError) as caught:
        tiny.parse(name)
    assert said in str(caught.value)
    assert [str(fault) for fault in faults_of(recipe(name))] == [f"model.path: {caught.value}"]


def test_a_name_is_no_path_and_no_hub_id(tmp_path):
    loaded = load_mapping({"model": STORIES, "data": {"path": "a.jsonl"}}, base=tmp_path)
    assert loaded.model.path == STORIES
    assert (model_kind(STORIES), sources.kind(STORIES), base_name(STORIES)) == ("tiny", "tiny", None)
    assert faults_of(recipe(STORIES)) == []


def test_its_memory_is_estimated_without_making_it():
    shape = estimate.shape(estimate.model_config(recipe(STORIES)) or {})
    assert (shape.hidden, shape.layers, shape.vocab, shape.tied) == (128, 3, 1000, True)
    for architecture in tiny.ARCHITECTURES:
        assert estimate.shape(tiny.parse(f"tiny:{architecture}").config).parameters > 60_000


# -- making ------------------------------------------------------------------------------------------------------------


def test_a_model_is_made_once_and_kept(made):
    first = sources.resolve(Model(path=STORIES))
    assert sources.resolve(Model(path=STORIES)) == first
    assert (first.kind, first.adapter, len(made)) == ("tiny", None, 1)
    assert made[0]["vocab_size"] == 1000 and made[0]["hidden_size"] == 128 and made[0]["seed"] == 0
    assert not list(first.base.parent.glob(".making-*"))


def test_other_sizes_seeds_texts_and_libraries_make_another(made, monkeypatch):
    data = Data(path="shipped:quorra/heldout.jsonl")
    names = [STORIES, f"{STORIES}&seed=1", "tiny:llama", "tiny:qwen2"]
    places = {sources.directory(name) for name in names} | {sources.directory(STORIES, data=data)}
    monkeypatch.setattr(sources, "version", lambda package: "2.0")
    places.add(sources.directory(STORIES))
    assert len(places) == len(made) == 6


def test_the_tokenizer_is_trained_on_the_recipes_own_data_or_on_shipped_texts(made, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hullo?"}, {"role": "assistant", "content": "Hullo!"}], "n": 3}]
    write_jsonl(tmp_path / "chat.jsonl", rows)
    sources.directory("tiny:llama", data=Data(path=str(tmp_path / "chat.jsonl")))
    sources.directory("tiny:llama")
    assert made[0]["texts"] == ["user", "Hullo?", "assistant", "Hullo!"]
    assert "What is the capital of Quorra?" in made[1]["texts"]
    assert any(text.startswith("Once upon a time") for text in made[1]["texts"])


def test_changed_data_make_a_tiny_model_anew_and_leave_others_alone(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    fetch, run = BY_NAME["fetch"], Run(tmp_path / "run")

    def marks(**data: str) -> list[str]:
        names = ("tiny:llama", "smollm2-135m")
        where = {"path": str(tmp_path / "train.jsonl"), **data}
        return [fingerprint(fetch, recipe(name, **where), run) for name in names]

    before = marks()
    assert marks() == before
    assert [new == old for new, old in zip(marks(limit=1), before, strict=True)] == [False, True]
    write_jsonl(tmp_path / "train.jsonl", [{"text": "two"}])
    assert [new == old for new, old in zip(marks(), before, strict=True)] == [False, True]
