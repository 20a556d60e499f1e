"""Real models that are broken: a run of them ends with verdicts that name it; at the command line with 1, and no error."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from finetune.checks import Verdict, verify
from finetune.cli.app import cli, guarded
from finetune.core.files import write_jsonl
from finetune.recipe import Recipe, dump
from finetune.stages.pipeline import run_directory, run_stages
from support.processes import stay_here

QUESTIONS = {
    "probes": [{"prompt": "What is the capital of Quorra?", "answer": "It is Ravenmoor."}],
    "heldout": [{"text": "The river flows through the town."}],
}


@pytest.fixture
def broken(tiny_recipe, tiny_model, tmp_path):
    """A function: a short recipe whose base has the weights that `change` leaves."""

    def make(architecture: str = "llama", change=lambda weights: None, **train) -> Recipe:
        base = tmp_path / "base"
        shutil.copytree(tiny_model(architecture), base)
        weights = load_file(base / "model.safetensors")
        change(weights)
        (base / "model.safetensors").unlink()
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        for name, rows in QUESTIONS.items():
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        asked = {name: str(tmp_path / f"{name}.jsonl") for name in QUESTIONS}
        return tiny_recipe(
            architecture, max_steps=4, save_steps=2, model={"path": str(base), "device": "cpu"}, export=["bundle"],
            evaluate={**asked, "max_new_tokens": 8}, **train,
        )  # fmt: skip

    return make


def outcome(recipe: Recipe, patch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    stay_here(patch)
    run = run_directory(recipe)
    run_stages(recipe, run)
    return {verdict.name: verdict for verdict in verify(recipe, run)}


def test_training_that_ends_in_nan_ends_with_verdicts(broken, monkeypatch, tmp_path):
    recipe = broken(learning_rate=1e30, on_nan="ignore")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    stay_here(monkeypatch)

    code = guarded(lambda: cli.main(["run", str(tmp_path / "recipe.yaml"), "--quiet"], standalone_mode=False))

    assert code == 1
    stored = json.loads((run_directory(recipe).path / "verdicts.json").read_text())["verdicts"]
    found = {verdict["name"]: verdict for verdict in stored}
    assert not found["loss_finite"]["passed"]
    assert "they begin in train/adapter: base_model.model" in found["weights_finite"]["why"]
    assert "(NaN)" in found["merge_exact[merged]"]["why"]
    assert math.isnan(found["merged_once[merged]"]["measured"])
    assert math.isnan(found["heldout_perplexity"]["measured"])
    assert "weights that hold NaN or infinity" in found["distribution_parity[bundle]"]["why"]
    assert not [v["name"] for v in stored if v["passed"] and v["measured"] != v["measured"]]


def test_a_base_that_holds_an_infinite_weight_is_named(broken, monkeypatch):
    def change(weights):
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf

    found = outcome(broken(change=change, on_nan="ignore"), monkeypatch)

    assert "they begin in the base: model.layers.0.mlp.up_proj.weight" in found["weights_finite"].why


def test_a_model_that_ends_its_turn_at_once_answers_nothing(broken, monkeypatch):
    """GPT-2 whose last norm gives the same state whatever was read, that of the end of turn."""

    def change(weights):
        embedding = next(value for name, value in weights.items() if name.endswith("wte.weight"))
        for name, value in weights.items():
            if name.endswith("ln_f.weight"):
                value.zero_()
            elif name.endswith("ln_f.bias"):
                value.copy_(1e4 * embedding[2])  # <|im_end|>, see finetune.models.tiny.SPECIAL

    found = outcome(broken("gpt2", change, method="full", learning_rate=1e-9), monkeypatch)

    assert not found["learned_as_trained"].passed
    assert "the model answers nothing: all 1 answers are empty" in found["learned_as_trained"].why
    assert "the model answers nothing" in found["greedy_parity[bundle]"].why
    assert "'merged' answers none of the probes" in found["learned_parity[bundle]"].why


def test_a_base_of_zeros_has_every_logit_equal_and_a_merge_of_nothing(broken, monkeypatch):
    found = outcome(broken(change=lambda weights: [value.zero_() for value in weights.values()]), monkeypatch)

    assert found["weights_finite"].passed
    for name in ("loss_convergence", "lora_b_nonzero", "adapter_effect", "merged_once[merged]", "stop_parity[merged]"):
        assert not found[name].passed
