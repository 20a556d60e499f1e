"""Adapter on base against merged: a merge done twice, or not at all, fails at that hop and is named."""

from __future__ import annotations

import shutil

import pytest

from finetune.backends import get
from support.chain import finished, tiny_recipe


@pytest.fixture(scope="module")
def chain(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("merge-faults")
        yield finished(tiny_recipe(tiny_model("llama"), folder, ["bundle"], method="lora", learning_rate=1e-2), patch)


@pytest.fixture
def merged(chain):
    """The merged model's folder, put back after the test."""
    folder = chain.run.path / "merge" / "model"
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    chain.seen.clear()
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)
    chain.seen.clear()


def test_a_sound_merge_passes(chain, merged):
    assert chain.compared() == {}


def test_a_merge_done_twice_fails(chain, merged, tmp_path):
    twice = get("torch").merge(merged, chain.run.path / "train" / "adapter", tmp_path / "twice", dtype="float32")
    shutil.copyfile(twice / "model.safetensors", merged / "model.safetensors")
    found = chain.compared()
    assert {"merged_once[merged]", "distribution_parity[merged]"} <= set(found)
    assert "the adapter is 2.000 times in the merged weights" in found["merged_once[merged]"]
    assert "the adapter is 2.00 times in the merged weights" in found["distribution_parity[merged]"]


def test_a_merge_that_never_happened_fails(chain, merged, tiny_model):
    shutil.copyfile(tiny_model("llama") / "model.safetensors", merged / "model.safetensors")
    assert "the adapter is 0.000 times" in chain.compared()["merged_once[merged]"]
