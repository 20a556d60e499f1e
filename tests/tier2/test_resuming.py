"""A resume is the same training, or it is said: with real weights, optimizers and schedules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.backends import get
from finetune.checks import verify
from finetune.core.errors import Faults, UsageError
from finetune.recipe.schedule import learning_rate
from finetune.run import evidence, identity
from finetune.stages.pipeline import checkpoint, run_directory, run_stages
from support.town import as_of_0_1

SHORT = {"max_steps": 8, "save_steps": 3, "save_total_limit": None, "lr_scheduler_type": "cosine", "warmup_steps": 2}
CHECKS = ("rows", "optimizer", "parameters")


@pytest.fixture
def short(tiny_recipe):
    """A function: a recipe of 8 steps, which end in the middle of an epoch, with changes."""
    return lambda *architecture, **changes: tiny_recipe(*architecture, **{**SHORT, **changes})


@pytest.fixture
def run(short):
    made = run_directory(short())
    run_stages(short(), made, ["train"])
    return made


def resume(recipe, run, name="checkpoint-3", **more: Any) -> None:
    run_stages(recipe, run, ["train"], resume=checkpoint(recipe, run, "train", name), **more)


def verdicts(recipe, run, *names: str) -> dict[str, Any]:
    return {verdict.name: verdict for verdict in verify(recipe, run, names or CHECKS)}


def failed(recipe, run, *names: str) -> dict[str, str]:
    return {name: verdict.why for name, verdict in verdicts(recipe, run, *names).items() if verdict.refuted}


def weights(run) -> Any:
    return get("torch").tensors(run.path / "train" / "adapter")


def test_an_honest_resume_is_bit_identical_and_judged_by_the_same_verdicts(run, short):
    # The parameters' checks need a scored model, the training's own do not.
    before, straight = weights(run), verdicts(short(), run, "rows", "optimizer")
    resume(short(), run)

    again = verdicts(short(), run, "rows", "optimizer")
    assert weights(run) == before
    assert again.keys() == straight.keys() >= {"step_size", "gradients_clipped", "one_training"}
    assert failed(short(), run, "rows", "optimizer") == {}
    assert [again[name].measured for name in straight] == [verdict.measured for verdict in straight.values()]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"lora": {"r": 4}}, "train.lora.r 16 -> 4"),
        ({"data": {"path": "shipped:quorra/train.jsonl", "limit": 9}}, "prepare/train.jsonl has other rows"),
        ({"architecture": "qwen2"}, "the base model is another: config.json, model.safetensors"),
        ({"optim": "adafactor"}, "train.optim adamw_torch -> adafactor"),
    ],
    ids=["rank", "rows", "base", "optimizer"],
)
def test_another_training_is_refused_by_name(run, short, changes, phrase):
    architecture = [changes.pop("architecture")] if "architecture" in changes else []
    with pytest.raises(Faults, match="checkpoint-3 is of another training") as refused:
        resume(short(*architecture, **changes), run)
    assert any(phrase in fault for fault in refused.value.faults), refused.value.faults


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_of_other_shapes_is_no_unexpected_error(short, method):
    run = run_directory(short(method=method))
    run_stages(short(method=method), run, ["train"])
    with pytest.raises(UsageError, match=r"checkpoint-3 is of another model or adapter: .* in the checkpoint"):
        resume(short("gpt2", method=method), run, changed=True)


def test_the_shapes_of_a_checkpoint_without_a_record_are_looked_at(run, short):
    as_of_0_1(run)
    config = run.path / "train" / "checkpoint-3" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))
    with pytest.raises(UsageError, match=r"lora_A.weight is 16 x \d+ in the checkpoint and 4 x \d+ in the model"):
        resume(short(lora={"r": 4}), run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_its_state_is_refused(run, short, name):
    (run.path / "train" / "checkpoint-3" / name).unlink()
    with pytest.raises(UsageError, match=rf"checkpoint-3 is damaged \({name} is gone"):
        resume(short(), run)
    as_of_0_1(run)
    with pytest.raises(Faults, match=r"checkpoint-3 has no (optimizer\.pt|scheduler\.pt|rng_state\*\.pth), so its"):
        resume(short(), run)


def rates(run, *parts: tuple[int, int], peak: float = 5e-3) -> list[tuple[float, float]]:
    found = []
    for step in evidence.steps(run, "train"):
        total = next(total for last, total in parts if step["step"] <= last)
        found.append((step["learning_rate"], learning_rate("cosine", peak, 2, step["step"], total)))
    return found


def test_training_for_longer_is_honest_and_passes_every_check(run, short):
    longer = short(max_steps=14)
    resume(longer, run, "last")

    assert run.require("train").metrics["plans"] == [[0, 8], [8, 14]]
    assert all(logged == pytest.approx(wanted, rel=1e-9) for logged, wanted in rates(run, (8, 8), (14, 14)))
    run_stages(longer, run)
    assert failed(longer, run, "labels", "artifacts", *CHECKS) == {}
    assert "step_size" in verdicts(longer, run)


def test_more_epochs_are_counted(short):
    epochs = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    run = run_directory(short(**epochs))
    run_stages(short(**epochs), run, ["train"])
    longer = short(**{**epochs, "num_train_epochs": 2})
    resume(longer, run, "last")

    found = verdicts(longer, run, "rows", "optimizer")
    assert "2.00 epochs; the recipe asks for 2 epochs" in found["trained_to_the_end"].why
    assert failed(longer, run, "rows", "optimizer") == {}


def test_insisting_trains_with_what_the_recipe_now_says(run, short):
    asked = short(learning_rate=1e-3, weight_decay=0.01)
    resume(asked, run, changed=True)

    after = rates(run, (8, 8), peak=1e-3)[3:]
    assert all(logged == pytest.approx(wanted, rel=1e-9) for logged, wanted in after)
    found = failed(asked, run, "rows", "optimizer")
    assert found.keys() == {"one_training", "learning_rate_as_asked"}, found
    assert "train.learning_rate 0.005 -> 0.001" in found["one_training"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resuming_at_the_last_step_gives_its_result(short, method):
    run, result = run_directory(short(method=method)), "adapter" if method == "lora" else "model"
    run_stages(short(method=method), run, ["train"])
    before = get("torch").tensors(run.path / "train" / result)
    straight = verdicts(short(method=method), run, "rows", "optimizer")
    resume(short(method=method), run, "checkpoint-8")

    assert get("torch").tensors(run.path / "train" / result) == before
    assert len(evidence.steps(run, "train")) == run.require("train").metrics["steps"] == 8
    assert verdicts(short(method=method), run, "rows", "optimizer").keys() == straight.keys()
    assert failed(short(method=method), run, "rows", "optimizer") == {}


def test_steps_that_are_logged_seldom_are_all_known_after_a_resume(short):
    seldom = short(logging_steps=50, max_steps=-1, num_train_epochs=2)
    run = run_directory(seldom)
    run_stages(seldom, run, ["train"])
    before = [(step["step"], step["loss"], step["rows"]) for step in evidence.steps(run, "train")]
    resume(seldom, run)

    assert [(step["step"], step["loss"], step["rows"]) for step in evidence.steps(run, "train")] == before
    assert failed(seldom, run, "rows", "optimizer") == {}


def test_a_first_step_of_rate_zero_leaves_the_first_move_to_the_resumed_part(short):
    early = short(save_steps=1)
    run = run_directory(early)
    run_stages(early, run, ["train"])
    straight = run.require("train").metrics["first_move"]
    record = identity.read(run.path / "train" / "checkpoint-1")
    assert record is not None
    assert record.past.first_move is None
    resume(early, run, "checkpoint-1")
    assert run.require("train").metrics["first_move"] == straight


def test_an_alignment_is_resumed_and_refused_as_a_training_is(short):
    pairs = {
        "data": {"path": "shipped:quorra/preferences.jsonl"},
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": None,
    }
    asked = short(align=pairs)
    run = run_directory(asked)
    run_stages(asked, run, ["align"])
    adapter, straight = run.path / "align" / "adapter", verdicts(asked, run, "optimizer")
    before = get("torch").tensors(adapter)
    for name in ("checkpoint-2", "checkpoint-4"):
        run_stages(asked, run, ["align"], resume=checkpoint(asked, run, "align", name))
        assert get("torch").tensors(adapter) == before
        assert failed(asked, run, "optimizer") == {}
        assert verdicts(asked, run, "optimizer").keys() == straight.keys() >= {"dpo_step_size", "dpo_one_training"}
    other = short(align={**pairs, "beta": 0.3})
    with pytest.raises(Faults, match=r"align\.beta 0\.1 -> 0\.3"):
        run_stages(other, run, ["align"], resume=checkpoint(other, run, "align", "checkpoint-2"))
