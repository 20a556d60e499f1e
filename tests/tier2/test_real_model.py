"""The embedded 135M model is trained, aligned, merged and asked, and every claim is read from what is on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.backends import Job, get
from finetune.backends.torch.loading import load_model
from finetune.backends.torch.sft import make_trainer
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.checks import CHECKS, verify
from finetune.core.files import read_jsonl
from finetune.data.templates import ChatTemplate
from finetune.run import evidence, layout
from finetune.run.plan import STAGES
from finetune.stages.pipeline import preview
from finetune.testing.validator import TrainingSuccessValidator

VERDICTS_MIN = 34


@pytest.fixture(scope="module")
def verdicts(recipe, trained_run):
    return {verdict.name: verdict for verdict in verify(recipe, trained_run)}


@pytest.fixture(scope="module")
def answers(trained_run):
    return evidence.rows(trained_run, layout.ANSWERS)


def test_every_check_passes_on_an_honest_run(verdicts):
    failed = [f"{v.name}: {v.measured} {v.compare} {v.bound}: {v.why}" for v in verdicts.values() if v.refuted]
    assert not failed
    assert len(verdicts) >= VERDICTS_MIN


def test_every_check_and_every_stage_ran(recipe, trained_run, verdicts):
    """But those of exports and of serving, which tier 3 has, and the invariances, which have tests of their own."""
    exporting = ("rehearse", "export", "compare")
    assert [check.name for check in CHECKS if not check.wanted(recipe)] == ["serving", "invariance", "parity"]
    assert [stage.name for stage in STAGES if not trained_run.report(stage.name)] == list(exporting)


def test_model_answers_the_made_up_facts(answers):
    taught = [a for a in answers if a["set"] == "probes" and a["kind"] == "trained"]
    right = [a for a in taught if a["phases"]["aligned"]["correct"]]
    assert not any(a["phases"]["base"]["correct"] for a in taught)
    assert len(right) >= len(taught) * 2 / 3


def test_resume_was_bit_identical(verdicts):
    assert verdicts["resume_losses"].measured == 0
    assert verdicts["resume_weights"].measured == 0


def test_first_logged_loss_is_that_of_the_answers_to_four_digits(verdicts, chosen_scale):
    bound = 1e-3 if chosen_scale.model == "smollm2-135m" else 0.2  # other models may train with dropout
    assert verdicts["loss_is_of_answers"].measured < bound


def test_validator_agrees_with_the_checks(recipe, trained_run, answers):
    backend = get("torch")
    losses = [step["loss"] for step in evidence.steps(trained_run, "train")]
    probes = [a for a in answers if a["set"] == "probes"]
    before, after = ([a["phases"][phase]["text"] for a in probes] for phase in ("base", "aligned"))
    memory = json.loads((trained_run.path / "measure" / "memory.json").read_text("utf-8"))
    initial, adapter = (backend.tensors(trained_run.path / "train" / name) for name in ("initial", "adapter"))
    validator = TrainingSuccessValidator
    assert validator.validate_loss_convergence(losses, max_initial=10.8)
    assert validator.validate_model_learning(before, after, probes)
    assert not validator.validate_model_learning(before, before, probes)
    state = [memory[method]["training_state_bytes"] for method in ("full", "lora")]
    assert validator.validate_memory_efficiency(*state)
    assert validator.validate_parameter_updates(initial, adapter)
    assert not validator.validate_parameter_updates(initial, initial)
    assert validator.validate_artifacts(trained_run.path / "train" / "adapter")


def test_measured_memory_holds_at_least_the_weights(trained_run):
    """A peak that was measured is above what must have been resident; a made-up one need not be."""
    weights = trained_run.report("train").metrics["weight_bytes"]
    assert weights < trained_run.report("train").peak["process"] < 8 * weights
    measured = json.loads((trained_run.path / "measure" / "memory.json").read_text("utf-8"))
    assert measured["full"]["peak_process_bytes"] > measured["lora"]["peak_process_bytes"] > weights


def test_our_renderer_is_the_tokenizers_own(recipe, trained_run):
    tokenizer = get("torch").tokenizer(evidence.final(trained_run, recipe)[0])
    template = ChatTemplate("model", tokenizer.chat_template)
    chat = [{"role": "user", "content": "Ünïcode 👩‍👩‍👧 <b>?"}]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        ours = template.render(
            messages, add_generation_prompt=True, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        theirs = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours == theirs


def test_a_masked_prompt_target_does_not_move_the_loss(trained_run):
    """A prompt token that nothing attends to is changed: all it can still be is a target. Masked, it must not count."""
    base = Path(evidence.fetched(trained_run)["base"])
    rows = trained_run.path / "prepare" / "train.jsonl"
    settings = {"dtype": "float32", "device": "cpu"}
    options = {"per_device_train_batch_size": 1, "max_steps": 1, "save_strategy": "no", "report_to": "none"}
    job = Job(objective="sft", method="full", model=base, out=trained_run.path / "unused", rows=rows, options=options,
              settings=settings)  # fmt: skip
    trainer = make_trainer(job, load_model(base, settings), HFTokenizer(base))
    row = read_jsonl(rows)[0]
    place = row["labels"].count(-100) // 2
    assert row["labels"][place] == -100

    def loss(token: int, labels: list[int]) -> float:
        ids = [*row["input_ids"][:place], token, *row["input_ids"][place + 1 :]]
        batch = trainer.data_collator([{"input_ids": ids, "labels": labels}])
        batch["attention_mask"][0, place] = 0
        return float(trainer.compute_loss(trainer.model, dict(batch)).detach())

    first, second = row["input_ids"][place], 100
    assert loss(first, row["labels"]) == loss(second, row["labels"])
    everything = [[*row["input_ids"][:place], token, *row["input_ids"][place + 1 :]] for token in (first, second)]
    assert loss(first, everything[0]) != pytest.approx(loss(second, everything[1]), rel=1e-3)


def test_a_finished_run_is_not_run_again(recipe, trained_run):
    assert not any(planned.runs for planned in preview(recipe, trained_run))


def test_a_fresh_process_verifies_the_run_and_a_changed_artifact_fails_it(trained_run, cli):
    fine = cli("verify", trained_run.path, "--json")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert json.loads(fine.stdout)["passed"]
    target = trained_run.path / "train" / "adapter" / "adapter_model.safetensors"
    whole = target.read_bytes()
    try:
        target.write_bytes(whole[:-4] + b"\0\0\0\1")
        broken = cli("verify", trained_run.path, "--check", "artifacts", "--json")
    finally:
        target.write_bytes(whole)
    assert broken.returncode == 1
    failed = [v["name"] for v in json.loads(broken.stdout)["verdicts"] if v["passed"] is False]
    assert set(failed) == {"artifacts_intact", "saved_last"}
