"""Training options on a tiny Llama: each does what its name says, and no check raises a false alarm over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune.backends import get
from finetune.checks import verify
from finetune.core.errors import Faults, MissingError, StageError, UsageError
from finetune.run import Run
from finetune.run.evidence import steps
from finetune.stages.pipeline import run_directory, run_stages

SHORT = {"max_steps": 8, "per_device_train_batch_size": 4, "max_length": 128, "save_steps": 4}
EXPECT = {"loss_below_unigram": False, "loss_reduction_min": 0.0}  # eight steps on random weights


def stored(run: Run, name: str = "adapter") -> dict[str, Any]:
    return get("torch").tensors(run.path / "train" / name)


def facts(run: Run) -> dict[str, Any]:
    return run.require("train").metrics


def rates(run: Run) -> list[float]:
    return [step["learning_rate"] for step in steps(run, "train")]


def saved(run: Run) -> list[str]:
    return sorted(path.name for path in (run.path / "train").glob("checkpoint-*"))


def adapter_config(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.path / "train" / "adapter" / "adapter_config.json").read_text("utf-8")))


def layers(run: Run) -> set[str]:
    return {name.split(".layers.")[1].split(".")[0] for name in stored(run)}


def modules(run: Run) -> set[str]:
    return {name.split(".")[-3] for name in stored(run) if "lora_A" in name}


def ranks(run: Run) -> dict[str, int]:
    return {name.split(".")[-3]: each.shape[0] for name, each in stored(run).items() if "lora_A" in name}


def bytes_a_weight(run: Run) -> float:
    """Of the frozen weights; PEFT keeps an adapter in float32 whatever they are."""
    found = facts(run)
    return float((found["weight_bytes"] - found["trainable_bytes"]) / found["frozen_parameters"])


CASES: dict[str, tuple[dict[str, Any], Callable[[Run], bool]]] = {
    "gradient_accumulation": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        lambda run: {len(step["rows"]) for step in steps(run, "train")} == {6},
    ),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, lambda run: len(steps(run, "train")) == 8),
    "packing": ({"packing": True}, lambda run: facts(run)["tokens"] / 8 > 4 * 60),
    "bfloat16_weights": (
        {"model": {"dtype": "bfloat16"}, "learning_rate": 2e-2, "max_steps": 30},
        lambda run: bytes_a_weight(run) == 2,
    ),
    "bf16": ({"bf16": True}, lambda run: bytes_a_weight(run) == 4),
    "full": ({"method": "full", "learning_rate": 3e-3}, lambda run: facts(run)["frozen_parameters"] == 0),
    "dora": (
        {"lora": {"use_dora": True}},
        lambda run: any("lora_magnitude_vector" in name for name in stored(run)),
    ),
    "rslora": ({"lora": {"use_rslora": True}}, lambda run: adapter_config(run)["use_rslora"]),
    "pissa": ({"lora": {"init_lora_weights": "pissa"}}, lambda run: b_norm(stored(run, "initial")) > 0),
    "gaussian": ({"lora": {"init_lora_weights": "gaussian"}}, lambda run: b_norm(stored(run, "initial")) == 0),
    "init_at_random": ({"lora": {"init_lora_weights": False}}, lambda run: b_norm(stored(run, "initial")) > 0),
    "rank_pattern": (
        {"lora": {"r": 8, "rank_pattern": {"q_proj": 2}}},
        lambda run: ranks(run)["q_proj"] == 2 and ranks(run)["v_proj"] == 8,
    ),
    "modules_to_save": (
        {"lora": {"modules_to_save": ["norm"]}},
        lambda run: any(name.endswith("norm.weight") for name in stored(run)),
    ),
    "layers_to_transform": (
        {"lora": {"layers_to_transform": [1]}, "learning_rate": 2e-2},
        lambda run: layers(run) == {"1"},
    ),
    "target_list": (
        {"lora": {"target_modules": ["q_proj", "v_proj"]}, "learning_rate": 2e-2},
        lambda run: modules(run) == {"q_proj", "v_proj"},
    ),
    "target_regex": (
        {"lora": {"target_modules": r".*layers\.1\..*_proj"}, "learning_rate": 2e-2},
        lambda run: layers(run) == {"1"},
    ),
    "neftune": (
        {"neftune_noise_alpha": 1.0},
        lambda run: abs(steps(run, "train")[0]["loss"] - scored_first(run)) > 1e-4,
    ),
    "label_smoothing": (
        {"label_smoothing_factor": 0.5},
        lambda run: abs(steps(run, "train")[0]["loss"] - scored_first(run)) > 1e-4,
    ),
    "dft": ({"loss_type": "dft"}, lambda run: steps(run, "train")[0]["loss"] < 0.5 * scored_first(run)),
    "schedule": (
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        lambda run: rates(run)[0] < max(rates(run)) > rates(run)[-1],
    ),
    "sgd": ({"optim": "sgd", "method": "full", "learning_rate": 0.5}, lambda run: facts(run)["optimizer_bytes"] == 0),
    "adafactor": (
        {"optim": "adafactor"},
        lambda run: 0 < facts(run)["optimizer_bytes"] < facts(run)["trainable_bytes"],
    ),
    "save_no": ({"save_strategy": "no"}, lambda run: saved(run) == []),
    "save_epoch": (
        {"save_strategy": "epoch", "max_steps": 18},
        lambda run: saved(run) == ["checkpoint-18", "checkpoint-9"],
    ),
    "early_stopping": (
        {
            "early_stopping_patience": 1,
            "early_stopping_threshold": 10.0,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
            "max_steps": 40,
            "eval_fraction": 0.2,
        },
        lambda run: len(steps(run, "train")) == 6,
    ),
}


def b_norm(tensors: dict[str, Any]) -> float:
    return float(sum(each.norm for name, each in tensors.items() if "lora_B" in name))


def scored_first(run: Run) -> float:
    """The loss of the first step's rows, scored independently with the base model (nats a token)."""
    scores = json.loads((run.path / "evaluate" / "rows.json").read_text("utf-8"))["base"]
    chosen = [scores[str(row)]["answer"] for row in steps(run, "train")[0]["rows"]]
    return float(-sum(total for total, _ in chosen) / sum(count for _, count in chosen))


@pytest.mark.parametrize("name", CASES)
def test_the_option_has_its_effect_and_every_check_holds(name, tiny_recipe, tiny_model):
    options, holds = CASES[name]
    given = {**SHORT, **options}
    data = {"path": "shipped:quorra/train.jsonl", "eval_fraction": given.pop("eval_fraction", 0.0)}
    model = {"path": str(tiny_model()), "device": "cpu", **given.pop("model", {})}
    recipe = tiny_recipe(**given, data=data, model=model, expect=EXPECT)
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])

    assert holds(run)
    failed = [
        f"{v.name}: {v.measured}: {v.why}" for v in verify(recipe, run, ["labels", "loss", "parameters"]) if v.refuted
    ]
    assert failed == []


def test_a_resume_survives_the_deletion_of_its_own_checkpoint(tiny_recipe):
    recipe = tiny_recipe(**{**SHORT, "save_total_limit": 1}, expect=EXPECT)
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    longer = tiny_recipe(**{**SHORT, "save_total_limit": 1, "max_steps": 16}, expect=EXPECT)
    run_stages(longer, run, ["train"], resume=run.path / "train" / "checkpoint-8")
    assert saved(run) == ["checkpoint-16"]
    assert facts(run)["resumed_from"] == 8


def test_names_that_the_model_lacks_are_all_told_before_training(tiny_recipe):
    lora = {"target_modules": ["q_projj"], "modules_to_save": ["lmhead"], "rank_pattern": {"vproj": 2}}
    recipe = tiny_recipe(lora=lora, optim="adamw_torhc", tf32=True)
    with pytest.raises(Faults) as caught:
        run_stages(recipe, run_directory(recipe), ["train"])
    text = str(caught.value)
    assert len(caught.value.faults) == 5
    for guess in ("'q_proj'", "'lm_head'", "'v_proj'", "'adamw_torch'", "NVIDIA GPU"):
        assert guess in text


def test_a_layer_beyond_the_last_is_told(tiny_recipe):
    recipe = tiny_recipe(lora={"layers_to_transform": [1, 9]})
    with pytest.raises(UsageError, match="no layer 9; its layers are 0 to 1"):
        run_stages(recipe, run_directory(recipe), ["train"])


def test_a_tracker_that_is_not_installed_is_missing(tiny_recipe):
    recipe = tiny_recipe(report_to="comet_ml")
    with pytest.raises(MissingError, match="comet"):
        run_stages(recipe, run_directory(recipe), ["train"])


def test_full_fine_tuning_of_an_adapter_is_refused_rather_than_dropping_it(tiny_recipe):
    recipe = tiny_recipe(**SHORT, expect=EXPECT)
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    model = {"path": str(run.path / "train" / "adapter"), "device": "cpu"}
    other = tiny_recipe(method="full", model=model, name="full")
    with pytest.raises(UsageError, match="would leave it out"):
        run_stages(other, run_directory(other), ["train"])


def test_alignment_alone_is_held_against_the_model_it_started_from(tiny_recipe):
    align = {"data": {"path": "shipped:quorra/preferences.jsonl"}, "max_steps": 8, "learning_rate": 5e-3}
    recipe = tiny_recipe()
    recipe = recipe.model_copy(update={"train": None, "align": type(recipe).model_validate(
        {"data": {"path": "x"}, "align": align}).align})  # fmt: skip
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])
    verdicts = {verdict.name: verdict for verdict in verify(recipe, run, ["preference"])}
    assert [name for name, verdict in verdicts.items() if verdict.refuted] == []
    assert "dpo_prefers_chosen" in verdicts


def test_a_model_that_lacks_weights_is_not_made_up_at_random(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from finetune.backends.torch.loading import load_model

    broken = shutil.copytree(tiny_model(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="9 of its weights are not in its files"):
        load_model(broken, {"device": "cpu"})


def test_libraries_say_nothing_to_the_user(tiny_recipe, capfd):
    recipe = tiny_recipe(
        "gpt2", **SHORT, label_smoothing_factor=0.1, lora={"modules_to_save": ["lm_head"]}, expect=EXPECT
    )
    run_stages(recipe, run_directory(recipe), ["merge"])
    said = capfd.readouterr()
    assert "Warning" not in said.err + said.out
    assert "[transformers]" not in said.err
