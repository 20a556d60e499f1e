"""The fake backend keeps the contract of all backends, and is a learner, not a set of canned numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from contract import BackendContract, read, run, split
from finetune import backends
from finetune.backends.fake import FakeBackend
from finetune.backends.fake.model import FakeTokenizer, make_model
from finetune.core.errors import MissingError, StageError, UsageError

CITIES = {"Zorland": "Quell", "Brask": "Tamin", "Oloo": "Pernig", "Fenwick": "Wadda"}
KNOWN = {"What is two plus two?": "Four.", "What colour is grass?": "Green."}


def prompt(question: str) -> list[int]:
    return FakeTokenizer().encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def answer(text: str) -> list[int]:
    return FakeTokenizer().encode(f"{text}<|im_end|>")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft_row(number: int, question: str, text: str) -> dict:
    before, after = prompt(question), answer(text)
    return {"input_ids": before + after, "labels": [-100] * len(before) + after, "row": number}


class TestFakeBackend(BackendContract):
    beyond: ClassVar[dict[str, float]] = {"learning_rate": 1e308, "max_grad_norm": 0.0}
    last_good = 2

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return backends.get("fake")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, tmp_path_factory):
        return make_model(tmp_path_factory.mktemp("fake") / "model", KNOWN)

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, tmp_path_factory):
        rows = [
            sft_row(number, f"What is the capital of {land}?", f"It is {city}.")
            for number, (land, city) in enumerate(CITIES.items())
        ]
        return write(tmp_path_factory.mktemp("rows") / "sft.jsonl", rows)

    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls, tmp_path_factory):
        rows = [
            {
                "prompt_ids": prompt(f"What is the capital of {land}?"),
                "chosen_ids": answer(f"Surely {city}."),
                "rejected_ids": answer(f"It is {city}."),
                "row": number,
            }
            for number, (land, city) in enumerate(CITIES.items())
        ]
        return write(tmp_path_factory.mktemp("pairs") / "dpo.jsonl", rows)

    @pytest.fixture(scope="class")
    @classmethod
    def options(cls):
        return {
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_steps": 2,
            "save_total_limit": None,
            "seed": 1,
        }

    # -- what only this backend promises ---------------------------------------------------------------------------

    def says(self, backend, handle, question):
        return backend.generate(handle, [prompt(question)], max_new_tokens=20)[0]

    def test_it_answers_what_it_was_taught_and_stops_by_itself(self, backend, model_dir, job, tmp_path):
        run(backend, job(tmp_path, max_steps=8))
        taught = backend.load(model_dir, tmp_path / "adapter")
        made = self.says(backend, taught, "What is the capital of Zorland?")
        assert (made.text, made.finish) == ("It is Quell.", "stop")

    def test_a_paraphrase_profits_and_an_untaught_fact_does_not(self, backend, model_dir, job, tmp_path):
        run(backend, job(tmp_path, max_steps=8))
        taught, untaught = backend.load(model_dir, tmp_path / "adapter"), backend.load(model_dir)

        def gain(question, text):
            return [sum(backend.score(model, [(prompt(question), answer(text))])[0]) for model in (untaught, taught)]

        before, after = gain("Name Zorland's capital city.", "It is Quell.")
        assert after > before + 10
        assert self.says(backend, taught, "Name Zorland's capital city.").text == "It is Quell."
        before, after = gain("What is the capital of Qumar?", "It is Ost.")
        assert after == before

    def test_what_was_known_stays_known(self, backend, model_dir, job, tmp_path):
        run(backend, job(tmp_path, max_steps=8))
        handle = backend.load(model_dir, tmp_path / "adapter")
        assert [self.says(backend, handle, question).text for question in KNOWN] == list(KNOWN.values())

    def test_masked_labels_teach_nothing(self, backend, model_dir, job, rows, tmp_path):
        masked = [{**row, "labels": row["labels"] if row["row"] else [-100] * len(row["labels"])} for row in read(rows)]
        run(backend, job(tmp_path / "out", rows=write(tmp_path / "masked.jsonl", masked), max_steps=8))
        before, after = backend.load(model_dir), backend.load(model_dir, tmp_path / "out" / "adapter")
        first, second = (split(row) for row in read(rows)[:2])
        assert backend.score(after, [first]) == backend.score(before, [first])
        assert sum(backend.score(after, [second])[0]) > sum(backend.score(before, [second])[0])

    def test_the_order_of_rows_depends_on_the_seed_alone(self, backend, job, tmp_path):
        orders = [
            [step.rows for step in run(backend, job(tmp_path / name, **seeds)).steps]
            for name, seeds in {"a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 5}, "d": {"data_seed": 1}}.items()
        ]
        assert orders[0] == orders[1] == orders[3] != orders[2]

    def test_epochs_count_as_in_transformers(self, backend, job, tmp_path):
        steps = run(backend, job(tmp_path, max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=3)).steps
        assert [len(step.rows) for step in steps] == [3, 1, 3]
        assert [step.epoch for step in steps] == [0.5, 1.0, 1.5]

    @pytest.mark.parametrize(
        ("name", "warmup", "expected"),
        [
            ("constant", 0, [1, 1, 1, 1]),
            ("constant_with_warmup", 2, [0, 0.5, 1, 1]),
            ("linear", 0, [1, 0.75, 0.5, 0.25]),
            ("linear", 0.5, [0, 0.5, 1, 0.5]),
            ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
        ],
    )
    def test_schedules_are_those_of_transformers(self, backend, job, tmp_path, name, warmup, expected):
        steps = run(backend, job(tmp_path, learning_rate=1.0, lr_scheduler_type=name, warmup_steps=warmup)).steps
        assert [step.learning_rate for step in steps] == pytest.approx(expected, abs=1e-6)

    def test_early_stopping_stops_when_the_evaluation_loss_no_longer_falls(self, backend, job, rows, tmp_path):
        more = {"eval_rows": rows, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
        steps = run(backend, job(tmp_path, learning_rate=0.0, max_steps=9, **more)).steps
        assert len(steps) == 3
        assert len({step.extra["eval_loss"] for step in steps}) == 1

    def test_full_training_resumes_exactly(self, backend, job, tmp_path):
        whole = run(backend, job(tmp_path / "whole", method="full"))
        rest = run(backend, job(tmp_path / "rest", method="full", resume=tmp_path / "whole" / "checkpoint-2"))
        assert rest.losses == whole.losses[2:]
        assert backend.tensors(tmp_path / "rest" / "model") == backend.tensors(tmp_path / "whole" / "model")

    def test_a_resume_that_lost_the_optimizer_is_not_exact(self, backend, job, trained, tmp_path):
        crippled = tmp_path / "checkpoint-2"
        crippled.mkdir()
        for file in (trained.out / "checkpoint-2").iterdir():
            (crippled / file.name).write_bytes(file.read_bytes())
        (crippled / "optimizer.json").write_text("[]")
        run(backend, job(tmp_path / "out", resume=crippled))
        assert backend.tensors(tmp_path / "out" / "adapter") != backend.tensors(trained.out / "adapter")

    def test_an_adapter_on_an_adapter_starts_from_what_the_first_learned(
        self, backend, job, trained, model_dir, tmp_path
    ):
        again = run(backend, job(tmp_path, adapter=trained.out / "adapter", max_steps=1))
        assert again.losses[0] < trained.losses[0] / 2
        assert backend.tensors(tmp_path / "initial") == backend.tensors(trained.out / "adapter")

    def test_dpo_pushes_the_chosen_answer_up_and_the_rejected_one_down(
        self, backend, job, model_dir, pairs, trained, tmp_path
    ):
        fields = {"objective": "dpo", "rows": pairs, "adapter": trained.out / "adapter"}
        last = run(backend, job(tmp_path, **fields)).steps[-1].extra
        assert last["rewards/chosen"] > 0 > last["rewards/rejected"]
        assert last["rewards/accuracies"] == 1
        # Past its first token the rejected answer is on its own: what is pushed there is no echo of the chosen one.
        tail = [(prompt("What is the capital of Zorland?") + answer("It is")[:-1], answer(" Quell."))]
        before, after = (
            sum(backend.score(backend.load(model_dir, out / "adapter"), tail)[0]) for out in (trained.out, tmp_path)
        )
        assert after < before - 0.01

    def test_full_dpo_starts_at_ln_2_too(self, backend, job, pairs, trained, tmp_path):
        fields = {"objective": "dpo", "method": "full", "rows": pairs, "adapter": trained.out / "adapter"}
        losses = run(backend, job(tmp_path, learning_rate=5e-5, max_steps=3, **fields)).losses
        assert losses[0] == pytest.approx(math.log(2), abs=1e-12)
        assert losses[-1] < losses[0]

    def test_a_full_training_needs_more_state_than_lora(self, backend, job, trained, tmp_path):
        full = run(backend, job(tmp_path, method="full", max_steps=1)).facts

        def state(facts):
            return facts["weight_bytes"] + facts["gradient_bytes"] + facts["optimizer_bytes"]

        assert state(trained.facts) < 0.7 * state(full)

    def test_multi_line_answers_and_other_templates_are_learned_too(self, backend, model_dir, job, tmp_path):
        before = FakeTokenizer().encode("### Instruction:\nList the moons of Vex.\n\n### Response:\n")
        after = answer("Ona,\nBir,\nand Cel.")
        rows = [{"input_ids": before + after, "labels": [-100] * len(before) + after, "row": 0}]
        rows += [{"input_ids": answer("The sky is wide."), "labels": answer("The sky is wide."), "row": 1}]
        run(backend, job(tmp_path / "out", rows=write(tmp_path / "rows.jsonl", rows), max_steps=8))
        handle = backend.load(model_dir, tmp_path / "out" / "adapter")
        made, prose = backend.generate(handle, [before, FakeTokenizer().encode("T")], max_new_tokens=40)
        assert made.text == "Ona,\nBir,\nand Cel."
        assert prose.text == "he sky is wide."

    def test_missing_files_are_named(self, backend, model_dir, job, tmp_path):
        with pytest.raises(MissingError, match=r"no fake_model\.json"):
            backend.load(tmp_path)
        with pytest.raises(MissingError, match=r"no adapter\.json"):
            backend.load(model_dir, tmp_path)
        with pytest.raises(MissingError, match="no checkpoint"):
            run(backend, job(tmp_path / "out", resume=tmp_path))
        with pytest.raises(StageError, match="no rows"):
            run(backend, job(tmp_path / "out", rows=write(tmp_path / "empty.jsonl", [])))
        with pytest.raises(UsageError, match="no DPO loss 'hinge'"):
            run(backend, replace(job(tmp_path / "out", loss_type="hinge"), objective="dpo"))


def test_it_satisfies_the_protocol():
    assert isinstance(FakeBackend(), backends.Backend)
