"""LoRA on a base that a quantizer holds: trained, saved, evaluated, and merged into the numbers that the base stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.backends import get
from finetune.backends.torch import merging, quantizers
from finetune.checks import verify
from finetune.core.errors import MissingError
from finetune.recipe import load_mapping
from finetune.recipe.quantizers import quantizer
from finetune.run import Run, evidence, layout, outcome
from finetune.stages.pipeline import run_directory, run_stages
from sabotage import baseline

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

NF4 = {"quantization": "nf4"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that knows things already, held in NF4, taught new ones and asked; with what a whole run measures."""
    place = tmp_path_factory.mktemp("nf4")
    mapping = baseline.recipe("lora", place / "data")
    mapping["model"] |= NF4
    mapping |= {"export": ["bundle"], "expect": {"memory_reduction_min": 0.3}, "output_dir": str(place / "runs")}
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    run_stages(recipe, run)
    return run


def recipe_of(run: Run) -> Any:
    from finetune.recipe import load

    return load(run.path / "recipe.yaml")


def test_every_check_passes_on_a_run_that_trained_on_a_quantized_base(taught):
    """Trained, scored again from disk, saved, merged, asked in a fresh process, and each held against the others."""
    verdicts = {verdict.name: verdict for verdict in verify(recipe_of(taught), taught)}

    assert {name: verdict.why for name, verdict in verdicts.items() if verdict.refuted} == {}
    proved = {name for name, verdict in verdicts.items() if verdict.outcome == outcome.PROVED}
    assert {
        "frozen_identical",
        "loss_is_of_answers",
        "learned_paraphrased",
        "fresh_process",
        "merge_exact[merged]",
    } <= proved
    assert verdicts["distribution_parity[merged]"].measured < 1e-9  # nats, from the adapter on the quantized base


def test_the_base_is_held_in_as_many_bits_as_the_row_says_and_the_estimate_knows(taught):
    found = evidence.read(taught, layout.MEMORY)
    lora, full = found["lora"], found["full"]

    assert lora["weight_bytes"] < 0.6 * full["weight_bytes"]
    assert lora["estimated"]["training_state"] == pytest.approx(lora["training_state_bytes"], rel=0.1)


def test_merged_weights_are_the_rounded_base_and_the_adapter_in_full_precision(taught):
    base, adapter = evidence.final(taught, recipe_of(taught))
    merged = taught.path / layout.MERGED.path
    assert adapter is not None

    exact = merging.exactness(base, adapter, merged, **NF4)
    assert exact is not None and exact["off"] == [] and exact["compared"] >= 21
    assert merging.factor(base, adapter, merged, **NF4) == pytest.approx(1, abs=1e-3)
    unrounded = merging.exactness(base, adapter, merged)
    assert unrounded is not None and len(unrounded["off"]) == 21, "each linear layer of three was rounded, nothing else"


def test_a_merge_that_rounds_base_and_adapter_together_is_found_out(taught, tmp_path):
    """What PEFT does by itself: the sum goes back into four bits."""
    from finetune.backends.torch.loading import load_adapter, load_model

    base, adapter = evidence.final(taught, recipe_of(taught))
    assert adapter is not None
    wrong = load_adapter(load_model(base, {**NF4, "device": "cpu"}), adapter).merge_and_unload()
    quantizers.chosen(NF4).dequantized(wrong).save_pretrained(str(tmp_path))  # type: ignore[union-attr]

    found = merging.exactness(base, adapter, tmp_path, **NF4)
    assert found is not None and len(found["off"]) == 21


def test_an_alignment_goes_on_from_an_adapter_on_a_quantized_base(tiny_recipe, tiny_model):
    model = {"path": str(tiny_model("llama")), "device": "cpu", **NF4}
    align = {"data": {"path": "shipped:quorra/preferences.jsonl"}, "max_steps": 3, "save_strategy": "no"}
    recipe = tiny_recipe(model=model, max_steps=4, align=align)
    run = run_directory(recipe)
    run_stages(recipe, run, ["align"])

    frozen = [run.require(stage).metrics for stage in ("train", "align")]
    assert all(each["frozen_sha256_before"] == each["frozen_sha256_after"] for each in frozen)
    assert get("torch").tensors(run.path / "train" / "adapter") != get("torch").tensors(run.path / "align" / "adapter")
    assert run.require("align").metrics["first_loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing preferred yet


def test_without_its_package_the_line_that_installs_it_is_told(monkeypatch):
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name="bitsandbytes")

    monkeypatch.setattr(quantizers, "import_module", absent)
    with pytest.raises(MissingError, match=r"'bitsandbytes' is not installed.*finetune-proof\[bitsandbytes\]"):
        quantizers.chosen(NF4)
    assert quantizer("nf4").extra == "bitsandbytes"


def test_a_quantizer_is_taken_from_its_own_module_where_its_row_names_one(monkeypatch, tmp_path: Path):
    (tmp_path / "acme_bits.py").write_text("KIND = 'acme'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import dataclasses

    row = dataclasses.replace(quantizer("nf4"), name="acme", module="acme_bits")
    monkeypatch.setattr(quantizers, "quantizer", lambda name: row)
    assert quantizers.chosen({"quantization": "acme"}).KIND == "acme"  # type: ignore[union-attr]
