"""Adapter on base against merged: a merge done twice, or not at all, fails at that hop and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.backends import get
from finetune.checks import results
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


def rewrite(merged: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})


def test_a_layer_that_was_left_out_fails_and_is_named(chain, merged, tiny_model):
    from safetensors.torch import load_file

    base = load_file(tiny_model("llama") / "model.safetensors")
    rewrite(merged, lambda found: found.update({name: base[name] for name in found if ".layers.1." in name}))
    why = chain.compared()["merge_exact[merged]"]
    assert "not base + adapter: model.layers.1.mlp.down_proj.weight" in why
    assert "and 4 more" in why  # seven linear weights of the layer: its norms have no adapter


def test_a_base_that_was_rounded_before_fails(chain, merged, tiny_model):
    import torch
    from safetensors.torch import load_file

    base = load_file(tiny_model("llama") / "model.safetensors")
    rewrite(
        merged,
        lambda found: found.update({n: w - base[n] + base[n].to(torch.bfloat16).float() for n, w in found.items()}),
    )
    assert "merge_exact[merged]" in chain.compared()


def test_a_head_of_its_own_fails(chain, merged):
    rewrite(merged, lambda found: found.update({"lm_head.weight": 0 * found["model.embed_tokens.weight"]}))
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "not base + adapter: lm_head.weight" in chain.compared()["merge_exact[merged]"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_to_the_type_that_is_asked_for_is_no_fault(chain, tiny_model, tmp_path, dtype):
    from finetune.backends.torch.merging import exactness, factor

    base, adapter = tiny_model("llama"), chain.run.path / "train" / "adapter"
    out = get("torch").merge(base, adapter, tmp_path / "out", dtype=dtype)
    found = exactness(base, adapter, out)
    assert found is not None and found["off"] == [] and found["compared"] >= 15
    assert found["worst"] <= 0 if dtype == "float32" else 0.1 < found["worst"] < 1
    assert factor(base, adapter, out) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("architecture", "lora", "judged"),
    [
        ("gpt2", {}, True),  # square weights that lie transposed
        ("qwen2", {"bias": "lora_only"}, True),
        ("qwen2", {"bias": "all", "use_rslora": True}, True),
        ("qwen2", {"modules_to_save": ["lm_head"]}, True),
        ("llama", {"modules_to_save": ["embed_tokens"]}, True),  # which unties the head
        ("llama", {"init_lora_weights": "pissa"}, False),  # which changes the base before the first step
        ("llama", {"rank_pattern": {"q_proj": 4}}, False),
    ],
    ids=str,
)
def test_a_sound_merge_of_any_adapter_passes(architecture, lora, judged, tiny_model, tmp_path, monkeypatch):
    chain = finished(
        tiny_recipe(
            tiny_model(architecture), tmp_path, ["bundle"], method="lora", learning_rate=1e-2, max_steps=3, lora=lora
        ),
        monkeypatch,
    )
    verdicts = {each.name: each for each in results(chain.recipe, chain.run, ["parity"])}
    assert ("merge_exact[merged]" in verdicts) == ("merged_once[merged]" in verdicts) == judged
    assert not {name for name, each in verdicts.items() if each.refuted} & {
        "merge_exact[merged]", "merged_once[merged]", "constants_parity[merged]", "adapter_carried[bundle]",
        "stop_tokens[merged]", "stored_bits[merged]", "vocabulary_parity[merged]", "template_carried[merged]",
    }  # fmt: skip


def test_an_adapter_of_another_kind_is_not_judged(chain, tiny_model, tmp_path):
    from finetune.backends.torch.merging import exactness

    adapter = shutil.copytree(chain.run.path / "train" / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert exactness(tiny_model("llama"), adapter, tiny_model("llama")) is None


def test_a_base_that_stops_elsewhere_is_merged_into_a_model_that_stops(chain, tiny_model, tmp_path):
    """Base models name the end of text, and the tokenizer of their chat version the end of a turn."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 0}))
    out = get("torch").merge(base, chain.run.path / "train" / "adapter", tmp_path / "out", dtype="float32")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_model_that_is_told_to_stop_elsewhere_fails(chain, merged):
    settings = json.loads((merged / "generation_config.json").read_text())
    (merged / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 0}))
    found = chain.compared()
    assert "at the ids [0], and the training taught to end it with [2]" in found["stop_tokens[merged]"]


def test_a_tokenizer_with_two_tokens_exchanged_fails_though_export_and_merge_agree(chain, merged):
    stored = json.loads((merged / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (merged / "tokenizer.json").write_text(json.dumps(stored))
    assert "its tokens are others, or have other numbers" in chain.compared()["vocabulary_parity[merged]"]
