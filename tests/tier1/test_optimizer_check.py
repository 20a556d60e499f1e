"""What the check of the optimizer owes by the recipe, and the size of Adam's first step, of which the fake backend has none:
an honest run of it is read as if it were torch's."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.checks import BY_NAME, NOT_EXAMINED, PROVED, REFUTED, Verdict, owed, results
from finetune.core.files import write_json
from finetune.recipe import Recipe
from finetune.run import Run
from support.town import as_if_written_so, edit_json, edit_rows


def like_torch(recipe: Recipe, **train: Any) -> Recipe:
    model = recipe.model.model_copy(update={"dtype": train.pop("dtype", "float32")})
    lora = recipe.train.lora.model_copy(update=train.pop("lora", {}))
    section = recipe.train.model_copy(update={**train, "lora": lora})
    return recipe.model_copy(update={"backend": "torch", "model": model, "train": section})


def told(run: Run, stage: str = "train", **facts: Any) -> None:
    """Facts of a training in single precision, as an Adam tells them; None takes a fact away."""

    def change(report: dict[str, Any]) -> None:
        found = report["metrics"]
        found.update({"first_move": 1.0, "trainable_bytes": 4 * found["trainable_parameters"], **facts})
        for key in [key for key, value in facts.items() if value is None and key == "first_move"]:
            del found[key]

    edit_json(run, f"{stage}/report.json", change)
    as_if_written_so(run)


def found(recipe: Recipe, run: Run) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in results(recipe, run, ["optimizer"])}


@pytest.mark.parametrize("stage", ["train", "align"])
@pytest.mark.parametrize(
    ("move", "outcome"),
    [(1.0, PROVED), (0.85, PROVED), (1.15, PROVED), (0.75, REFUTED), (1.25, REFUTED), (0.1, REFUTED)],
)
def test_the_first_step_of_an_adam_is_the_learning_rate(copied, stage, move, outcome):
    recipe, run = like_torch(copied.recipe), copied.run
    other = {"train": "align", "align": "train"}[stage]
    told(run, stage, first_move=move)
    told(run, other)
    verdicts = found(recipe, run)
    name = "step_size" if stage == "train" else "dpo_step_size"

    assert verdicts[name].outcome == outcome
    rest = {each: verdict.outcome for each, verdict in verdicts.items() if each != name}
    assert set(rest.values()) == {PROVED}


@pytest.mark.parametrize(
    "otherwise",
    [
        {"optim": "sgd"},
        {"optim": "adamw_bnb_8bit"},
        {"adam_epsilon": 1e-3},
        {"weight_decay": 0.1},
        {"learning_rate": 1e-7},
        {"dtype": "bfloat16", "method": "full"},
        {"dtype": "bfloat16", "lora": {"modules_to_save": ["lm_head"]}},
        {"dtype": "bfloat16", "lora": {"bias": "all"}},
    ],
    ids=lambda change: "-".join(change),
)
def test_the_size_of_the_first_step_is_owed_where_it_must_be_the_learning_rate(honest, otherwise):
    assert "step_size" in owed(BY_NAME["optimizer"], like_torch(honest.recipe))
    assert "step_size" in owed(BY_NAME["optimizer"], like_torch(honest.recipe, dtype="bfloat16"))
    assert "step_size" not in owed(BY_NAME["optimizer"], like_torch(honest.recipe, **otherwise))
    assert "step_size" not in owed(BY_NAME["optimizer"], honest.recipe)  # the fake backend is no Adam


def test_a_first_step_that_nobody_told_is_no_evidence(copied):
    recipe, run = like_torch(copied.recipe), copied.run
    told(run, first_move=None)

    assert found(recipe, run)["step_size"].outcome == REFUTED
    assert "first_move" in found(recipe, run)["step_size"].why


def test_weights_trained_in_another_type_than_asked_for_are_named(copied):
    recipe, run = like_torch(copied.recipe), copied.run
    told(run, trainable_bytes=2 * 880)

    assert found(recipe, run)["step_size"].outcome == REFUTED
    assert "1,760 bytes" in found(recipe, run)["step_size"].why


@pytest.mark.parametrize(("logged", "outcome"), [(3, NOT_EXAMINED), (None, REFUTED), (4, REFUTED)])
def test_a_resumed_optimizer_has_no_first_step_where_the_log_says_so_too(copied, logged, outcome):
    recipe, run = like_torch(copied.recipe), copied.run

    def resumed(rows: list[dict[str, Any]]) -> None:
        begun = [row for row in rows if row["event"] == "training" and row["stage"] == "train"]
        begun[-1]["resumed_from"] = logged

    edit_rows(run, "events.jsonl", resumed)
    told(run, first_move=None, resumed_from=3)
    verdict = found(recipe, run)["step_size"]

    assert verdict.outcome == outcome
    if outcome == NOT_EXAMINED:
        assert "resumed at step 3" in verdict.why
        assert "finetune train RECIPE --force" in verdict.remedy


def test_a_resumed_training_that_carried_its_first_step_over_is_held_to_it(copied):
    recipe, run = like_torch(copied.recipe), copied.run
    told(run, first_move=2.0, resumed_from=3)

    assert found(recipe, run)["step_size"].outcome == REFUTED


def test_a_warm_up_may_begin_below_what_single_precision_takes(copied):
    recipe, run = like_torch(copied.recipe), copied.run
    told(run)
    edit_rows(
        run,
        "events.jsonl",
        lambda rows: [
            {**row, "learning_rate": 1e-8} if row["event"] == "step" and row["step"] == 1 else row for row in rows
        ],
    )
    verdict = found(recipe, run)["step_size"]

    assert verdict.outcome == NOT_EXAMINED
    assert "warmup_steps" in verdict.remedy


@pytest.mark.parametrize(
    ("config", "dtype", "outcome"),
    [
        ({"bias": "none"}, "bfloat16", PROVED),
        ({"modules_to_save": ["lm_head"]}, "bfloat16", NOT_EXAMINED),
        ({"modules_to_save": ["lm_head"]}, "float32", PROVED),
    ],
)
def test_an_adapter_that_is_trained_further_may_train_parts_of_the_model(copied, tmp_path, config, dtype, outcome):
    recipe, run = like_torch(copied.recipe, dtype=dtype), copied.run
    told(run)
    write_json(tmp_path / "theirs" / "adapter_config.json", config)
    edit_json(run, "fetch/model.json", lambda model: model.update(adapter=str(tmp_path / "theirs")))

    assert found(recipe, run)["step_size"].outcome == outcome


def test_dropout_is_that_of_the_adapter_which_the_training_went_on_from(copied, tmp_path):
    recipe, run = copied
    write_json(tmp_path / "theirs" / "adapter_config.json", {"lora_dropout": 0.25})
    edit_json(run, "fetch/model.json", lambda model: model.update(adapter=str(tmp_path / "theirs")))
    verdict = found(recipe, run)["settings_as_asked"]
    assert verdict.outcome == REFUTED
    assert "lora_dropout 0 instead of 0.25" in verdict.why

    edit_json(run, "train/report.json", lambda report: report["metrics"].update(lora_dropout=0.25))
    assert found(recipe, run)["settings_as_asked"].outcome == PROVED


def test_the_dropout_that_the_recipe_asks_for_must_have_been_there(copied):
    """Whatever the adapter says of itself."""
    asked = like_torch(copied.recipe, lora={"lora_dropout": 0.1}).model_copy(update={"backend": "fake"})
    edit_json(copied.run, "train/adapter/adapter_config.json", lambda config: config.update(lora_dropout=0.0))

    assert "lora_dropout 0 instead of 0.1" in found(asked, copied.run)["settings_as_asked"].why


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"fp16": True}, {"learning_rate_as_asked"}),
        ({"max_grad_norm": 0.0}, {"gradients_clipped"}),
        ({"optim": "lomo"}, {"settings_as_asked", "step_size"}),
        ({"optim": "adafactor"}, {"step_size"}),
    ],
    ids=["fp16", "no clipping", "lomo", "adafactor"],
)
def test_what_is_owed_follows_the_recipe(honest, change, gone):
    whole = set(owed(BY_NAME["optimizer"], like_torch(honest.recipe)))

    assert whole - set(owed(BY_NAME["optimizer"], like_torch(honest.recipe, **change))) == gone


def test_a_training_that_was_resumed_after_its_last_step_measured_no_gradient(copied):
    """It was killed between its last checkpoint and its result."""
    recipe, run = copied
    told(run, clipped_norm=None, resumed_from=12, lora_dropout=None)
    verdicts = found(recipe, run)

    assert verdicts["gradients_clipped"].outcome == NOT_EXAMINED
    assert verdicts["settings_as_asked"].outcome == PROVED
    told(run, clipped_norm=None, resumed_from=6)
    assert found(recipe, run)["gradients_clipped"].outcome == REFUTED
