"""The backend contract on PyTorch, with a tiny random Llama; and the other architectures through LoRA and in full."""

from __future__ import annotations

import json

import pytest

from contract import BackendContract, write_rows
from finetune.backends import get
from finetune.checks import verify
from finetune.models import tiny
from finetune.stages.pipeline import run_directory, run_stages

ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma", "phi3")


class TestTorchBackend(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return get("torch")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, tiny_model):
        return tiny_model("llama")

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls):
        return {"dtype": "float32", "device": "cpu"}

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, backend, model_dir, tmp_path_factory):
        return write_rows(backend.tokenizer(model_dir), tmp_path_factory.mktemp("rows") / "rows.jsonl")

    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls, rows, tmp_path_factory):
        file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
        made = [json.loads(line) for line in rows.read_text().splitlines()]
        with file.open("w") as stream:
            for number, row in enumerate(made):
                cut = row["labels"].count(-100)
                other = made[number - 1]
                pair = {"prompt_ids": row["input_ids"][:cut], "chosen_ids": row["input_ids"][cut:], "row": number,
                        "rejected_ids": other["input_ids"][other["labels"].count(-100):]}  # fmt: skip
                stream.write(json.dumps(pair) + "\n")
        return file


def test_the_swept_architectures_are_tiny_models():
    assert len(ARCHITECTURES) == 5 and set(ARCHITECTURES) <= set(tiny.ARCHITECTURES)  # tier 3 sweeps every one


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_falls_and_the_machinery_holds_on(architecture, tiny_recipe):
    """Random weights learn no facts through LoRA: everything must hold but beating the words' own frequencies."""
    recipe = tiny_recipe(architecture, expect={"loss_below_unigram": False})
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])
    verdicts = verify(recipe, run, ["labels", "loss", "parameters"])
    assert failures(verdicts) == []
    assert {"loss_confirmed", "loss_is_of_answers", "lora_b_nonzero"} <= {v.name for v in verdicts}


def failures(verdicts):
    return [f"{v.name}: {v.measured} {v.compare} {v.bound}: {v.why}" for v in verdicts if v.refuted]


def test_full_fine_tuning_learns_through_the_same_stages(tiny_recipe):
    recipe = tiny_recipe(method="full", max_steps=60, learning_rate=3e-3)
    run = run_directory(recipe)
    run_stages(recipe, run)
    verdicts = {v.name: v for v in verify(recipe, run)}
    assert failures(verdicts.values()) == []
    assert verdicts["fresh_process"].measured < 1e-3
    assert verdicts["loss_confirmed"].measured > 0.5


def test_learning_rate_zero_fails_the_checks_that_guard_learning(tiny_recipe):
    recipe = tiny_recipe(learning_rate=0.0)
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])
    failed = {verdict.name for verdict in verify(recipe, run, ["loss", "parameters"]) if verdict.refuted}
    assert failed >= {"loss_convergence", "loss_confirmed", "parameters_changed", "lora_b_nonzero", "adapter_effect"}


def test_packed_training_answers_for_the_same_loss(tiny_recipe):
    expect = {"loss_below_unigram": False}
    recipe = tiny_recipe(packing=True, max_length=128, per_device_train_batch_size=2, expect=expect)
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])
    assert failures(verify(recipe, run, ["labels", "loss", "parameters"])) == []
