"""The estimate against runs that were measured, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import ResourceError, UsageError
from finetune.core.files import write_json, write_jsonl
from finetune.models import sources
from finetune.recipe import Recipe, load_mapping
from finetune.recipe.sections import Align, Lora, Train
from finetune.run import Run
from finetune.training import estimate as module
from finetune.training.estimate import EMBEDDED, MIB, estimate, guard, model_config, shape

SMOLLM2 = EMBEDDED["smollm2-135m"]
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}

# Measured on a CPU in float32, batches of 4 rows: method, tokens a row, checkpointing, state in MiB, process peak.
MEASURED = [
    ("full", 64, False, (513, 513, 1026), 2977),
    ("lora", 64, False, (532, 19, 37), 1792),
    ("full", 256, False, (513, 513, 1026), 4870),
    ("lora", 256, False, (532, 19, 37), 4471),
    ("lora", 256, True, (532, 19, 37), 2488),
]

FETCHED = {
    **dict.fromkeys(("path", "kind", "license_source"), "said"),
    **dict.fromkeys(("adapter", "license", "license_text")),
    "files": {},
    "adapter_files": {},
}


def _train(**keys: Any) -> Train:
    return Train(**{"per_device_train_batch_size": 4, **keys})


@pytest.mark.parametrize(("method", "tokens", "checkpointing", "state", "peak"), MEASURED)
def test_estimate_agrees_with_what_was_measured(
    method: str, tokens: int, checkpointing: bool, state: tuple[int, int, int], peak: int
) -> None:
    found = estimate(SMOLLM2, _train(method=method, gradient_checkpointing=checkpointing), tokens)

    for bytes_, measured in zip((found.weights, found.gradients, found.optimizer), state, strict=True):
        assert bytes_ / MIB == pytest.approx(measured, abs=0.7)
    assert found.training_state / MIB == pytest.approx(sum(state), rel=0.02)
    assert found.total / MIB == pytest.approx(peak, rel=0.15)


def test_measured_table_was_swept() -> None:
    assert len(MEASURED) == 5


def test_estimate_keeps_the_order_of_the_measured_peaks() -> None:
    estimated = [estimate(SMOLLM2, _train(method=m, gradient_checkpointing=c), t).total for m, t, c, _, _ in MEASURED]
    measured = [peak for *_, peak in MEASURED]

    assert sorted(range(5), key=estimated.__getitem__) == sorted(range(5), key=measured.__getitem__)


def test_lora_keeps_more_activations_than_full_training_as_measured() -> None:
    lora, full = (estimate(SMOLLM2, _train(method=method), 256) for method in ("lora", "full"))

    assert 4471 - 588 > 4870 - 2052  # the measured peaks less their training states
    assert lora.activations > 1.2 * full.activations


def test_parameters_of_known_models_are_exact() -> None:
    assert shape(SMOLLM2).parameters == 134_515_008
    assert shape(GPT2).parameters == 124_439_808


def test_untied_embeddings_count_twice() -> None:
    untied = shape({**SMOLLM2, "tie_word_embeddings": False}).parameters

    assert untied - shape(SMOLLM2).parameters == 49152 * 576


def test_lora_parameters_follow_rank_and_modules() -> None:
    def count(**keys: Any) -> int:
        return estimate(SMOLLM2, _train(lora=Lora(**keys)), 64).trainable

    assert count(r=16) == 4_884_480
    assert count(r=8) * 2 == count(r=16)
    assert count(target_modules=["q_proj", "v_proj"]) == 30 * 16 * ((576 + 576) + (576 + 192))
    assert count(layers_to_transform=[0, 1]) == 2 * 4_884_480 // 30


@pytest.mark.parametrize(
    ("optim", "per_parameter"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("lion_32bit", 4), ("rmsprop", 4)]
)
def test_optimizers_differ(optim: str, per_parameter: int) -> None:
    found = estimate(SMOLLM2, _train(method="full", optim=optim), 64)

    assert found.optimizer == per_parameter * found.trainable


def test_adafactor_keeps_rows_and_columns_only() -> None:
    found = estimate(SMOLLM2, _train(method="full", optim="adafactor"), 64)

    assert 0 < found.optimizer < found.trainable // 10


def test_bfloat16_halves_weights_of_full_training() -> None:
    whole, half = (estimate(SMOLLM2, _train(method="full"), 64, dtype=dtype) for dtype in ("float32", "bfloat16"))

    assert half.weights * 2 == whole.weights
    assert half.activations * 2 == whole.activations


def test_dpo_rows_count_twice() -> None:
    align = Align(data={"path": "x.jsonl"}, per_device_train_batch_size=4)  # type: ignore[arg-type]

    assert estimate(SMOLLM2, align, 64).tokens_per_step == 2 * estimate(SMOLLM2, _train(), 64).tokens_per_step


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="no 'hidden_size'"):
        shape({"model_type": "llama"})


def test_sizes_of_a_multimodal_config_are_those_of_its_text_part() -> None:
    assert shape({"model_type": "both", "text_config": SMOLLM2}).parameters == shape(SMOLLM2).parameters


def test_every_embedded_model_has_its_shape_here() -> None:
    assert set(EMBEDDED) == set(sources.EMBEDDED)


# -- recipes -----------------------------------------------------------------------------------------------------------


def _recipe(**sections: Any) -> Recipe:
    return load_mapping({"data": {"path": "x.jsonl"}, **sections})


def test_config_of_a_local_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))

    assert model_config(_recipe(model={"path": str(tmp_path)})) == GPT2


def test_config_of_an_adapter_is_that_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "smollm2-135m"}))

    assert model_config(_recipe(model={"path": str(tmp_path)})) == SMOLLM2


def test_config_of_a_hub_model_is_not_known_beforehand() -> None:
    assert model_config(_recipe(model={"path": "gpt2"})) is None


def test_guard_names_the_need_the_room_and_ways_to_lower_it(tmp_path: Path) -> None:
    recipe = _recipe(train={"method": "full"})
    need = estimate(SMOLLM2, _train(method="full"), 1024)

    with pytest.raises(ResourceError) as caught:
        guard(need, tmp_path, recipe, have=2 * 1024 * MIB)

    text = str(caught.value)
    assert f"{need.total / 1024 / MIB:.1f} GiB" in text
    assert "2.0 GiB is available" in text
    for way in ("train.method: lora", "gradient_checkpointing", "per_device_train_batch_size", "max_length"):
        assert way in text


def test_guard_lets_pass_what_fits(tmp_path: Path) -> None:
    need = estimate(SMOLLM2, _train(), 64)

    guard(need, tmp_path, _recipe(), have=need.total)


def test_guard_refuses_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = estimate(SMOLLM2, _train(method="full"), 64)
    monkeypatch.setattr(module, "disk_free", lambda path: 1024 * MIB)

    with pytest.raises(ResourceError, match=r"too little disk: .* 1.0 GiB is free"):
        guard(need, tmp_path, _recipe(train={"method": "full"}), have=need.total)


def _prepared(tmp_path: Path, length: int) -> Run:
    run = Run(tmp_path / "run").create()
    write_json(run.path / "model" / "config.json", SMOLLM2)
    write_json(run.path / "fetch" / "model.json", FETCHED | {"base": str(run.path / "model")})
    write_jsonl(run.path / "prepare" / "train.jsonl", [{"input_ids": [1] * size} for size in (8, length)])
    return run


def test_resources_are_checked_with_the_longest_prepared_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_IGNORE_ESTIMATE", raising=False)
    recipe = _recipe(train={"max_length": 4096, "per_device_train_batch_size": 4})
    monkeypatch.setattr(module, "room", lambda recipe: 2500 * MIB)

    module.check_resources(recipe, _prepared(tmp_path, 64))

    with pytest.raises(ResourceError, match="at 2048 tokens a step"):
        module.check_resources(recipe, _prepared(tmp_path, 512))


def test_resources_can_be_checked_for_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_IGNORE_ESTIMATE", raising=False)
    monkeypatch.setattr(module, "room", lambda recipe: 2500 * MIB)

    with pytest.raises(ResourceError, match="full training"):
        module.check_resources(_recipe(), _prepared(tmp_path, 64), method="full")


def test_before_anything_is_known_only_the_impossible_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FT_IGNORE_ESTIMATE", raising=False)
    recipe = _recipe(train={"max_length": 8192, "per_device_train_batch_size": 64})
    monkeypatch.setattr(module, "room", lambda recipe: 1000 * MIB)
    module.check_start(recipe, tmp_path)

    monkeypatch.setattr(module, "room", lambda recipe: 800 * MIB)
    with pytest.raises(ResourceError):
        module.check_start(recipe, tmp_path)


def test_the_user_may_try_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "room", lambda recipe: 0)
    monkeypatch.setenv("FT_IGNORE_ESTIMATE", "1")

    module.check_start(_recipe(), tmp_path)
    module.check_resources(_recipe(), _prepared(tmp_path, 64))
