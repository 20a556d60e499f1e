"""What is saved is what was trained, and the trainer's rewards are DPO's: cases beside the honest run of test_checks.py."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from finetune.backends import TensorFacts
from finetune.backends.fake import FakeBackend
from finetune.checks import parameters, preference, results
from finetune.checks.parts import WITHOUT
from finetune.core.files import write_json
from finetune.recipe.sections import Align, Lora
from support.town import edit_json


def write_tensors(file: Path, size: int) -> None:
    """A safetensors file with so many bytes of tensors."""
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def verdicts(ran, check="artifacts"):
    return {verdict.name: verdict for verdict in results(ran.recipe, ran.run, [check])}


@pytest.mark.parametrize(
    ("stored", "trained", "passed"),
    [(400, 400, True), (400, 200, True), (200, 400, False), (398, 400, False), (0, 400, False), (400, 0, False)],
)
def test_tensors_are_stored_as_precisely_as_they_were_trained(copied, monkeypatch, stored, trained, passed):
    monkeypatch.setitem(WITHOUT, "fake", {})
    copied = copied._replace(recipe=copied.recipe.model_copy(update={"align": None}))
    monkeypatch.setattr(FakeBackend, "tensors", lambda self, path: {"a": TensorFacts(sha256="0", shape=(1,), norm=1.0)})
    for part, size in enumerate((stored // 4, stored - stored // 4)):
        write_tensors(copied.run.path / "train" / "adapter" / f"part-{part}.safetensors", size)
    edit_json(copied.run, "train/report.json", lambda report: report["metrics"].update(trainable_bytes=trained))

    assert verdicts(copied)["saved_precision"].passed == passed


def test_a_backend_that_stores_no_safetensors_has_no_precision_and_no_other_may_do_without(copied):
    assert "saved_precision" not in verdicts(copied)
    other = copied._replace(recipe=copied.recipe.model_copy(update={"backend": "torch"}))

    assert verdicts(other)["saved_precision"].refuted


@pytest.mark.parametrize(("stage", "step"), [("train", 12), ("align", 6)])
def test_where_the_last_checkpoint_was_deleted_there_is_no_evidence(copied, stage, step):
    assert verdicts(copied)["saved_last"].passed
    shutil.rmtree(copied.run.path / stage / f"checkpoint-{step}")

    found = verdicts(copied)["saved_last"]
    assert found.refuted
    assert f"{stage}/checkpoint-{step}, is not there" in found.why


def test_early_stopping_keeps_the_best_checkpoint_and_not_the_last(copied):
    patient = {"early_stopping_patience": 2, "eval_strategy": "steps"}
    recipe = copied.recipe.model_copy(update={"train": copied.recipe.train.model_copy(update=patient), "align": None})

    assert "saved_last" not in verdicts(copied._replace(recipe=recipe))


def test_an_adapter_that_was_trained_further_keeps_its_own_settings(copied, tmp_path):
    theirs = {"r": 8, "lora_alpha": 99, "base_model_name_or_path": "somebody/base", "target_modules": ["b", "a"]}
    write_json(tmp_path / "source" / "adapter_config.json", theirs)
    edit_json(copied.run, "fetch/model.json", lambda found: found.update(adapter=str(tmp_path / "source")))
    assert not verdicts(copied)["adapter_config"].passed

    for stage in ("train", "align"):
        edit_json(copied.run, f"{stage}/adapter/adapter_config.json", lambda own: own.update(theirs))
    edit_json(copied.run, "train/adapter/adapter_config.json", lambda own: own.update(target_modules=["a", "b"]))
    assert verdicts(copied)["adapter_config"].passed


def test_a_list_of_target_modules_must_be_the_one_that_was_asked_for(copied):
    def found(*names):
        lora = Lora(**{**copied.recipe.train.lora.model_dump(), "target_modules": list(names)})
        train = copied.recipe.train.model_copy(update={"lora": lora})
        recipe = copied.recipe.model_copy(update={"train": train})
        return verdicts(copied._replace(recipe=recipe))["adapter_config"]

    stored = json.loads((copied.run.path / "train" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert found(*reversed(stored)).passed
    assert "target_modules" in found(*stored[1:]).why


@pytest.mark.parametrize(
    ("decode", "encode", "said"),
    [
        (lambda text: text, lambda ids: ids, ""),
        (lambda text: text.replace("a", "e"), lambda ids: ids, "means 'e' instead of 'a'"),
        (lambda text: text, lambda ids: ids[::-1], "read otherwise"),
    ],
    ids=["the same", "other ids", "other merges"],
)
def test_the_saved_tokenizer_is_the_bases(copied, monkeypatch, decode, encode, said):
    made = FakeBackend.tokenizer

    class Another:
        def __init__(self, original):
            self.original, self.vocab_size = original, original.vocab_size

        def decode(self, ids):
            return decode(self.original.decode(ids))

        def encode(self, text):
            return encode(self.original.encode(text))

    def tokenizer(self, model, *, trust_remote_code):
        return Another(made(self, model)) if model.parent.name == "merge" else made(self, model)

    monkeypatch.setattr(FakeBackend, "tokenizer", tokenizer)
    found = verdicts(copied)["saved_tokenizer"]

    assert found.passed == (not said)
    assert said in found.why


def test_a_kind_of_matrix_that_full_training_left_as_it_was_is_found():
    def facts(sha256, *shape):
        return TensorFacts(sha256=sha256, shape=shape, norm=1.0)

    before = {"embed.weight": facts("1", 9, 4), "layers.0.norm.weight": facts("2", 4)}
    before |= {f"layers.{number}.q.weight": facts("3", 4, 4) for number in range(3)}
    after = {**before, "embed.weight": facts("4", 9, 4), "layers.1.q.weight": facts("5", 4, 4)}

    assert parameters._kinds(before, after).passed  # one layer of three, and a norm that stayed
    lost = parameters._kinds(before, {**after, "embed.weight": before["embed.weight"]})
    assert (lost.passed, lost.measured) == (False, 0.5)
    assert "embed.weight" in lost.why
    assert not parameters._kinds(before, {}).passed


def test_rewards_are_not_asked_for_where_no_checkpoint_was(copied):
    align = copied.recipe.align.model_copy(update={"save_strategy": "no"})
    recipe = copied.recipe.model_copy(update={"align": align})
    names = {verdict.name for verdict in results(recipe, copied.run, ["preference"])}

    assert "dpo_margin" in names
    assert not names & {"dpo_rewards_confirmed", "dpo_loss_confirmed"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -math.log(1 / (1 + math.exp(-0.5 * 3)))),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "hinge", "beta": 0.1}, 0.7),
        ({"loss_type": "ipo"}, (2 / 4 - -1 / 5 - 1) ** 2),
        ({"loss_type": "robust", "label_smoothing": 0.0}, -math.log(1 / (1 + math.exp(-0.5 * 3)))),
        ({"loss_type": "robust", "label_smoothing": 0.25}, (0.75 * 0.2014133 - 0.25 * 1.7014133) / 0.5),
    ],
)
def test_the_loss_of_a_pair_is_that_of_its_paper(options, expected):
    align = Align(**{"data": {"path": "pairs.jsonl"}, "beta": 0.5, **options})
    gain, tokens = {"chosen": 2.0, "rejected": -1.0}, {"chosen": 4, "rejected": 5}

    assert preference.LOSSES[align.loss_type](align, gain, tokens) == pytest.approx(expected, abs=1e-6)


def test_every_preference_loss_that_a_recipe_can_ask_for_is_known():
    asked = Align.model_fields["loss_type"].annotation.__args__
    assert set(preference.LOSSES) == set(asked)
    assert len(asked) == 4


def test_a_resume_that_began_elsewhere_is_named(copied):
    edit_json(copied.run, "measure/resume.json", lambda r: r["losses_resumed"].update({"1": 3.0}))

    assert "began at step 1" in verdicts(copied, "resume")["resume_losses"].why
