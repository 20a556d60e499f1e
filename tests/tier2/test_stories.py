"""A tiny model, made on the spot, learns from nothing but the shipped stories."""

from __future__ import annotations

import json

import pytest

from finetune.backends import get
from finetune.checks import results
from finetune.core.files import digest
from finetune.models import sources
from finetune.recipe import load
from finetune.recipe.examples import example
from finetune.run import Run, evidence, layout
from finetune.stages.pipeline import run_stages
from finetune.training import estimate
from support.stories import UNIGRAM_ENTROPY

STEPS = 60


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The recipe of the stories for a few steps, and its run through what is measured."""
    folder = tmp_path_factory.mktemp("stories")
    changes = (f"train.max_steps={STEPS}", "train.save_strategy='no'", "model.device=cpu", f"output_dir={folder}")
    recipe = load(example("stories"), changes)
    run = Run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_CACHE_DIR", str(folder / "cache"))
        run_stages(recipe, run, ["measure"])
    return recipe, run


def test_it_learns_from_scratch_as_the_checks_have_it(told):
    verdicts = results(*told, only=["labels", "loss", "parameters", "optimizer", "retention"])
    assert len(verdicts) == 27
    assert [verdict for verdict in verdicts if verdict.refuted] == []


def test_the_first_loss_is_a_guess_over_the_vocabulary(told):
    _, run = told
    steps, uniform = evidence.steps(run, "train"), run.require("prepare").metrics["uniform_entropy"]
    assert len(steps) == STEPS
    assert steps[0]["loss"] == pytest.approx(uniform, rel=0.02)
    assert steps[-1]["loss"] < uniform / 2
    assert run.require("prepare").metrics["unigram_entropy"] == pytest.approx(UNIGRAM_ENTROPY, abs=1e-3)


def test_the_same_name_and_data_make_the_same_model(told, tmp_path, monkeypatch):
    recipe, run = told
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path))
    again = sources.resolve(recipe.model, recipe.data)
    files = json.loads((run.path / "fetch" / "model.json").read_text("utf-8"))["files"]
    assert len(files) >= 4
    assert {name: digest(again.base / name) for name in files} == {name: file["sha256"] for name, file in files.items()}


def test_its_size_is_as_estimated(told):
    recipe, run = told
    shape = estimate.shape(estimate.model_config(recipe) or {})
    assert run.require("fetch").metrics["parameters"] == shape.parameters
    assert run.require("prepare").metrics["vocab_size"] == shape.vocab


def test_every_story_trains_through_its_end(told):
    recipe, run = told
    tokenizer = get("torch").tokenizer(evidence.phases(run, recipe)["base"][0])
    rows = evidence.rows(run, layout.TRAIN_ROWS)
    assert len(rows) == 360
    assert all(row["labels"] == row["input_ids"] and row["labels"][-1] in tokenizer.eos_ids for row in rows)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("Once upon a time")
