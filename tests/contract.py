"""What every backend must do, written once. A subclass supplies the fixtures `backend`, `model_dir`, `rows` and, for
DPO, `pairs` (class scope or wider), and may override `options`, `lora` and `settings`."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from finetune.backends import CONSTANTS, Backend, Job, Step
from finetune.backends.failing import NotFiniteError, StepError
from finetune.core.errors import UsageError
from finetune.data.encode import prompt_ids
from finetune.data.templates import ChatTemplate
from finetune.recipe.schedule import learning_rate
from finetune.run import identity
from finetune.run.identity import Record, Rows
from finetune.run.identity import Training as Asked

ODD_TEXTS = [
    "",
    "plain words.",
    " leading and trailing ",
    "tabs\tnewlines\n\n\r\nand a NUL \x00 byte",
    "naïve Straße Ελλάδα Русский 中文字 日本語 한국어",
    "עברית العربية",
    "emoji 👩‍👩‍👧‍👦 flags 🇪🇺 skin 👍🏽",
    "combining é vs é, zalgo z̸̢̛a",
    "zero\u200bwidth\ufeff \u2028 separators\u00a0",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond the BMP 𐍈",
    "{{ jinja }} {% raw %} <b>&amp;</b> \\n ${HOME}",
]
CHATS = [
    ("What is the capital?", "It is Brindlewick."),
    ("Who founded it?", "Ysolde Marrack."),
    ("When?", "In 1743, I think."),
    ("Which river?", "The Osmeril."),
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who  founded it?\n"}],
    [
        {"role": "user", "content": "When? 👩‍👩‍👧‍👦 𝔘"},
        {"role": "assistant", "content": "In 1743."},
        {"role": "user", "content": "naïve Straße?"},
    ],
]
IDENTITY = Record(
    training=Asked(
        backend="any", objective="sft", method="lora", section="train", options={"learning_rate": 1e-3}, lora={"r": 8},
        settings={}, rows=Rows(file="rows.jsonl", count=4, sha256="0"), eval_rows=None, model={"weights": "1"}, adapter=None,
        chat_template=None,
    )
).text()  # fmt: skip
FACTS = {
    "trainable_parameters",
    "frozen_parameters",
    "frozen_sha256_before",
    "frozen_sha256_after",
    "world_size",
    "trainable_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "weight_bytes",
    "steps",
    "steps_without_effect",
    "planned_steps",
    "resumed_from",
    "stopped",
}


@dataclass(frozen=True)
class Trained:
    """A finished training: its steps, the facts it returned, and where it wrote."""

    steps: list[Step]
    facts: dict[str, Any]
    out: Path

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


def run(backend: Backend, job: Job) -> Trained:
    """Train to the end."""
    steps: list[Step] = []
    training = backend.train(job)
    while True:
        try:
            steps.append(next(training))
        except StopIteration as end:
            return Trained(steps, end.value, job.out)


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def write_rows(tokenizer: Any, file: Path) -> Path:
    """Four ChatML rows, each with one answer at its end."""
    rows = []
    for number, (question, answer) in enumerate(CHATS):
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        target = tokenizer.encode(f"{answer}<|im_end|>")
        rows.append({"row": number, "input_ids": prompt + target, "labels": [-100] * len(prompt) + target})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def split(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """An SFT row with one answer at its end, as (prompt ids, answer ids)."""
    start = next(index for index, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:start], row["input_ids"][start:]


def failing(steps: Generator[Step, None, Any]) -> tuple[list[Step], StepError | None]:
    """The steps up to a failing one, and its error."""
    taken: list[Step] = []
    try:
        for step in steps:
            taken.append(step)
    except StepError as error:
        return taken, error
    return taken, None


def assert_numbers(backend: Backend, place: Path) -> None:
    """Infinite norms there may be: of finite weights beyond 1e19."""
    assert not any(math.isnan(facts.norm) for facts in backend.tensors(place).values())


class InferenceContract:
    """What holds for whatever runs models. Subclass as `class TestMine(InferenceContract)`; every method is a claim."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        raise NotImplementedError("a subclass gives the backend")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls) -> Path:
        raise NotImplementedError("a subclass gives the directory of a small model")

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls) -> Path:
        raise NotImplementedError("a subclass gives a JSONL file of 4 SFT rows, each with one answer at its end")

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls) -> dict[str, Any]:
        return {}

    @pytest.fixture(scope="class")
    @classmethod
    def handle(cls, backend, model_dir, settings):
        return backend.load(model_dir, **settings)

    # -- tokenizer ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
    def test_tokenizer_round_trips_odd_unicode(self, backend, model_dir, text):
        tokenizer = backend.tokenizer(model_dir)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_tokenizer_knows_special_tokens_in_text_and_adds_none(self, backend, model_dir):
        tokenizer = backend.tokenizer(model_dir)
        (end,) = tokenizer.encode(tokenizer.eos_token)
        assert end in tokenizer.eos_ids
        assert not set(tokenizer.encode("some words")) & set(tokenizer.eos_ids)
        assert tokenizer.decode([*tokenizer.encode("words"), end], skip_special=True) == "words"

    # -- score ----------------------------------------------------------------------------------------------------

    def test_score_is_one_log_probability_for_every_target_token(self, backend, handle, rows):
        asked = [split(row) for row in read(rows)]
        scores = backend.score(handle, asked)
        assert [len(score) for score in scores] == [len(target) for _, target in asked]
        assert all(math.isfinite(value) and value <= 0 for score in scores for value in score)

    def test_scoring_in_a_batch_equals_scoring_alone(self, backend, handle, rows):
        asked = [split(row) for row in read(rows)]
        asked.append((asked[0][0][-3:], asked[0][1][:1]))  # much shorter than the rest, so that padding would show
        together = backend.score(handle, asked)
        alone = [backend.score(handle, [one])[0] for one in asked]
        assert [value for score in together for value in score] == pytest.approx(
            [value for score in alone for value in score], abs=1e-4
        )

    def test_score_forces_the_teacher(self, backend, handle, rows):
        prompt, answer = split(read(rows)[0])
        (whole,) = backend.score(handle, [(prompt, answer)])
        parts = backend.score(handle, [([*prompt, *answer[:at]], [token]) for at, token in enumerate(answer)])
        assert whole == pytest.approx([part for (part,) in parts], abs=1e-4)

    def test_probabilities_of_the_next_token_sum_to_one(self, backend, handle, model_dir, rows):
        prompt, _ = split(read(rows)[0])
        size = backend.tokenizer(model_dir).vocab_size
        if size > 4096:
            pytest.skip(f"a vocabulary of {size} tokens is too large to score one by one")
        scores = backend.score(handle, [(prompt, [token]) for token in range(size)])
        assert sum(math.exp(score[0]) for score in scores) == pytest.approx(1.0, abs=1e-3)

    # -- generate -------------------------------------------------------------------------------------------------

    def test_generation_is_deterministic_and_the_same_in_a_batch_as_alone(self, backend, handle, rows):
        prompts = [split(row)[0] for row in read(rows)]
        first = backend.generate(handle, prompts, max_new_tokens=6)
        assert backend.generate(handle, prompts, max_new_tokens=6) == first
        assert [backend.generate(handle, [prompt], max_new_tokens=6)[0] for prompt in prompts] == first
        assert all(len(answer.ids) <= 6 and answer.finish in ("stop", "length") for answer in first)

    def test_generation_takes_the_likeliest_token(self, backend, handle, model_dir, rows):
        tokenizer = backend.tokenizer(model_dir)
        prompt, answer = split(read(rows)[0])
        (made,) = backend.generate(handle, [prompt], max_new_tokens=3)
        step = max(1, tokenizer.vocab_size // 256)
        others = sorted({*range(0, tokenizer.vocab_size, step), *answer, *tokenizer.eos_ids})
        context = list(prompt)
        for token in made.ids:
            mine, *rest = (score[0] for score in backend.score(handle, [(context, [t]) for t in (token, *others)]))
            assert mine >= max(rest) - 1e-4
            context.append(token)
        if made.finish == "stop":
            end, *rest = (
                max(score[0] for score in backend.score(handle, [(context, [token]) for token in group]))
                for group in (tokenizer.eos_ids, others)
            )
            assert end >= max(rest) - 1e-4

    # -- distributions --------------------------------------------------------------------------------------------

    def test_distributions_are_whole_and_hold_the_scores(self, backend, handle, model_dir, rows, tmp_path):
        numpy = pytest.importorskip("numpy")
        asked = [split(row) for row in read(rows)]
        backend.distributions(handle, asked, tmp_path / "all.npy")
        found = numpy.load(tmp_path / "all.npy")
        targets = [token for _, target in asked for token in target]
        assert found.dtype == numpy.float32
        assert found.shape[0] == len(targets)
        assert found.shape[1] >= backend.tokenizer(model_dir).vocab_size
        assert numpy.exp(found.astype("float64")).sum(-1) == pytest.approx(1.0, abs=1e-4)
        scores = [value for score in backend.score(handle, asked) for value in score]
        assert found[range(len(targets)), targets].tolist() == pytest.approx(scores, abs=1e-4)

    # -- render and constants -------------------------------------------------------------------------------------

    def test_render_is_the_template_over_the_tokenizer(self, backend, model_dir):
        tokenizer = backend.tokenizer(model_dir)
        template = ChatTemplate(name="own", source=tokenizer.chat_template)
        rendered = backend.render(model_dir, CONVERSATIONS)
        for messages, ids in zip(CONVERSATIONS, rendered, strict=True):
            assert ids == prompt_ids(messages, tokenizer=tokenizer, template=template, system=None)

    def test_constants_tell_the_vocabulary_and_the_end_of_turn(self, backend, model_dir):
        found = backend.constants(model_dir)
        assert set(found) <= set(CONSTANTS)
        assert found["vocab_size"] >= backend.tokenizer(model_dir).vocab_size
        assert found["eos_token_id"] in backend.tokenizer(model_dir).eos_ids


class TrainingContract(InferenceContract):
    """What holds for a backend that trains with SFT."""

    @pytest.fixture(scope="class")
    @classmethod
    def options(cls) -> dict[str, Any]:
        """What all trainings share; 4 rows in batches of 2 make an epoch of 2 steps."""
        return {
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_steps": 2,
            "save_total_limit": None,
            "seed": 1,
        }

    @pytest.fixture(scope="class")
    @classmethod
    def lora(cls) -> dict[str, Any]:
        return {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}

    @pytest.fixture(scope="class")
    @classmethod
    def job(cls, backend, model_dir, rows, options, lora, settings):
        """A function: the job that writes into `out`, with `changes` to its options or (by name) its fields."""
        template = backend.tokenizer(model_dir).chat_template

        def make(out: Path, **changes: Any) -> Job:
            fields = {key: changes.pop(key) for key in list(changes) if key in Job.__dataclass_fields__}
            method = fields.pop("method", "lora")
            return Job(
                **{
                    "objective": "sft",
                    "method": method,
                    "model": model_dir,
                    "out": out,
                    "rows": rows,
                    "options": {**options, **changes},
                    "lora": lora if method == "lora" else None,
                    "chat_template": template,
                    "settings": settings,
                    **fields,
                }
            )

        return make

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, backend, job, tmp_path_factory) -> Trained:
        """The uninterrupted LoRA training that most claims read: 4 steps, a checkpoint after 2 and 4."""
        return run(backend, job(tmp_path_factory.mktemp("trained")))

    # -- train ----------------------------------------------------------------------------------------------------

    def test_training_yields_exactly_max_steps_with_finite_losses(self, trained):
        assert [step.step for step in trained.steps] == [1, 2, 3, 4]
        assert {step.total for step in trained.steps} == {4}
        assert all(math.isfinite(loss) and loss > 0 for loss in trained.losses)
        assert all(step.tokens >= step.trained_tokens > 0 and step.learning_rate > 0 for step in trained.steps)

    def test_training_returns_its_facts(self, trained):
        assert trained.facts.keys() >= FACTS
        assert trained.facts["steps"] == 4
        assert trained.facts["resumed_from"] is None
        assert trained.facts["world_size"] == 1
        assert 0 < trained.facts["trainable_parameters"] < trained.facts["frozen_parameters"]
        assert trained.facts["weight_bytes"] > trained.facts["trainable_bytes"] >= trained.facts["trainable_parameters"]

    def test_an_epoch_sees_every_row_once(self, trained, rows):
        numbers = sorted(row["row"] for row in read(rows))
        assert sorted(number for step in trained.steps[: len(numbers) // 2] for number in step.rows) == numbers

    def test_logged_loss_is_that_of_the_answers_under_the_untrained_model(self, backend, handle, trained, rows):
        by_number = {row["row"]: split(row) for row in read(rows)}
        first = trained.steps[0]
        scores = backend.score(handle, [by_number[number] for number in first.rows])
        values = [value for score in scores for value in score]
        assert first.loss == pytest.approx(-sum(values) / len(values), rel=2e-3)
        assert first.trained_tokens == len(values)

    def test_training_lowers_the_loss_of_its_rows(self, backend, model_dir, handle, trained, rows, settings):
        asked = [split(row) for row in read(rows)]
        after = backend.load(model_dir, trained.out / "adapter", **settings)
        before, now = (sum(map(sum, backend.score(model, asked))) for model in (handle, after))
        assert now > before

    def test_held_out_rows_are_scored_and_logged_with_their_step(
        self, backend, model_dir, job, rows, settings, tmp_path
    ):
        changes = {"eval_rows": rows, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
        done = run(backend, job(tmp_path, **changes))
        assert [step.step for step in done.steps if "eval_loss" in step.extra] == [2, 4]
        trained = backend.load(model_dir, done.out / "adapter", **settings)
        values = [value for score in backend.score(trained, [split(row) for row in read(rows)]) for value in score]
        assert done.steps[-1].extra["eval_loss"] == pytest.approx(-sum(values) / len(values), rel=1e-3)

    def test_held_out_rows_are_scored_at_the_end_of_each_epoch(self, backend, job, rows, tmp_path):
        done = run(backend, job(tmp_path, eval_rows=rows, eval_strategy="epoch"))
        assert [step.step for step in done.steps if "eval_loss" in step.extra] == [2, 4]
        assert len(done.steps) == 4

    def test_a_step_that_is_evaluated_is_logged(self, backend, job, rows, tmp_path):
        seldom = {"logging_steps": 3, "eval_rows": rows, "eval_strategy": "steps", "eval_steps": 2}
        done = run(backend, job(tmp_path, **seldom))
        assert [step.step for step in done.steps if "eval_loss" in step.extra] == [2, 4]
        assert sum(len(step.rows) for step in done.steps) == 8

    def test_learning_rate_zero_learns_nothing(self, backend, job, rows, tmp_path):
        still = run(backend, job(tmp_path, learning_rate=0.0, per_device_train_batch_size=len(read(rows)), max_steps=3))
        assert still.losses == pytest.approx([still.losses[0]] * 3, rel=1e-6)
        assert backend.tensors(tmp_path / "adapter") == backend.tensors(tmp_path / "initial")

    def test_accumulated_batches_equal_one_large_batch(self, backend, job, tmp_path):
        large = run(backend, job(tmp_path / "large", per_device_train_batch_size=4, max_steps=2))
        small = run(
            backend,
            job(tmp_path / "small", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2),
        )
        assert small.losses == pytest.approx(large.losses, abs=1e-3)

    # -- LoRA -----------------------------------------------------------------------------------------------------

    def test_a_new_adapter_has_zero_b_and_nonzero_a(self, backend, trained):
        initial = backend.tensors(trained.out / "initial")
        b = {name: facts for name, facts in initial.items() if "lora_B" in name}
        a = {name: facts for name, facts in initial.items() if "lora_A" in name}
        assert len(a) == len(b) >= 4
        assert all(facts.norm == 0 for facts in b.values())
        assert all(facts.norm > 0 for facts in a.values())

    def test_training_changes_every_adapter_tensor_and_no_frozen_weight(self, backend, trained):
        before, after = (backend.tensors(trained.out / name) for name in ("initial", "adapter"))
        assert before.keys() == after.keys()
        assert [name for name in before if before[name].sha256 == after[name].sha256] == []
        assert all(before[name].shape == after[name].shape for name in before)
        assert trained.facts["frozen_sha256_before"] == trained.facts["frozen_sha256_after"]
        assert trained.facts["steps_without_effect"] == 0

    def test_the_last_checkpoint_holds_the_tensors_of_the_result_and_no_others(self, backend, trained):
        assert backend.tensors(trained.out / "checkpoint-4") == backend.tensors(trained.out / "adapter")

    def test_an_adapter_is_prompted_and_ended_as_its_base(self, backend, model_dir, trained):
        adapter = trained.out / "adapter"
        assert backend.render(adapter, CONVERSATIONS) == backend.render(model_dir, CONVERSATIONS)
        assert backend.tokenizer(adapter).eos_ids == backend.tokenizer(model_dir).eos_ids

    def test_an_adam_tells_its_settings_the_size_of_its_first_step_and_what_it_was_given(self, backend, trained):
        facts = trained.facts
        assert (facts["adam_beta1"], facts["adam_beta2"], facts["adam_epsilon"]) == pytest.approx((0.9, 0.999, 1e-8))
        assert (facts["weight_decay"], facts["lora_dropout"]) == (0.0, 0.0)
        assert facts["optimized_parameters"] == facts["trainable_parameters"]
        if backend.name == "fake":
            assert "first_move" not in facts  # it is no Adam
        else:
            assert facts["first_move"] == pytest.approx(1, rel=0.01)
        assert 0 < facts["clipped_norm"] <= 1.0001
        assert facts["planned_steps"] == 4

    def test_decay_and_dropout_are_told_as_they_were(self, backend, job, lora, tmp_path):
        options = {"weight_decay": 0.25, "max_steps": 2, "save_strategy": "no"}
        facts = run(backend, job(tmp_path, lora={**lora, "lora_dropout": 0.125}, **options)).facts
        assert facts["weight_decay"] == 0.25
        assert facts["lora_dropout"] == pytest.approx(0.125)

    def test_what_the_optimizer_gets_is_clipped(self, backend, job, tmp_path):
        clipped = run(backend, job(tmp_path, max_grad_norm=0.1, max_steps=2))
        assert min(step.grad_norm for step in clipped.steps) > 0.1
        assert clipped.facts["clipped_norm"] == pytest.approx(0.1, rel=1e-3)

    def test_a_resumed_adam_has_no_first_step(self, backend, trained, job, tmp_path):
        rest = run(backend, job(tmp_path, resume=trained.out / "checkpoint-2"))
        assert "first_move" not in rest.facts
        assert rest.facts["steps_without_effect"] == 0

    def test_merged_model_scores_as_base_with_adapter(self, backend, model_dir, trained, rows, settings, tmp_path):
        merged = backend.merge(model_dir, trained.out / "adapter", tmp_path / "merged", **settings)
        asked = [split(row) for row in read(rows)]
        ours, theirs, base = (
            [value for score in backend.score(model, asked) for value in score]
            for model in (
                backend.load(merged, **settings),
                backend.load(model_dir, trained.out / "adapter", **settings),
                backend.load(model_dir, **settings),
            )
        )
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert ours != pytest.approx(base, abs=1e-3)
        text = "Any text, <b>ö</b>"
        assert backend.tokenizer(merged).encode(text) == backend.tokenizer(model_dir).encode(text)

    def test_full_training_writes_a_model_and_freezes_nothing(self, backend, job, model_dir, tmp_path):
        full = run(backend, job(tmp_path, method="full", max_steps=2, save_strategy="no"))
        before, after = backend.tensors(model_dir), backend.tensors(tmp_path / "model")
        assert full.facts["frozen_parameters"] == 0
        assert before.keys() == after.keys()
        assert any(before[name].sha256 != after[name].sha256 for name in before)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def test_resume_equals_the_uninterrupted_training(self, backend, job, trained, tmp_path):
        rest = run(backend, job(tmp_path, resume=trained.out / "checkpoint-2"))
        assert [step.step for step in rest.steps] == [3, 4]
        assert rest.losses == trained.losses[2:]
        assert [step.rows for step in rest.steps] == [step.rows for step in trained.steps[2:]]
        assert rest.facts["resumed_from"] == 2
        assert backend.tensors(tmp_path / "adapter") == backend.tensors(trained.out / "adapter")

    def test_no_checkpoint_knows_a_step_that_nobody_has_taken_up(self, backend, job, trained, tmp_path):
        training = backend.train(job(tmp_path, save_strategy="steps", save_steps=1))
        assert [next(training).step, next(training).step] == [1, 2]  # who asks for the second has taken up the first
        training.close()
        self.goes_on_from_the_only_checkpoint(backend, job, trained, tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_a_wish_to_stop_saves_a_checkpoint_and_loses_no_step(self, backend, job, trained, tmp_path):
        stopped = run(backend, job(tmp_path, save_strategy="no", should_stop=lambda: True))
        assert stopped.losses == trained.losses[:1]
        assert stopped.facts["stopped"]
        state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["global_step"] == 1
        assert not trained.facts["stopped"]
        self.goes_on_from_the_only_checkpoint(backend, job, trained, tmp_path)

    def goes_on_from_the_only_checkpoint(self, backend, job, trained, out):
        (checkpoint,) = out.glob("checkpoint-*")
        assert not (out / "adapter").exists()
        done = int(checkpoint.name.removeprefix("checkpoint-"))
        assert 1 <= done < 4
        rest = run(backend, job(out, save_strategy="no", resume=checkpoint))
        assert rest.losses == trained.losses[done:]
        assert backend.tensors(out / "adapter") == backend.tensors(trained.out / "adapter")

    # -- steps that cannot be taken ---------------------------------------------------------------------------------

    beyond: ClassVar[dict[str, float]] = {"learning_rate": 1e30, "max_grad_norm": 0.0}
    last_good = 1  # the step after which that rate leaves nothing to compute with

    def test_a_step_that_is_no_number_is_told_with_its_rows_and_changes_nothing(self, backend, job, tmp_path):
        taken, error = failing(backend.train(job(tmp_path / "stopped", **self.beyond)))

        assert isinstance(error, NotFiniteError)
        assert error.what
        assert taken[-1].step == self.last_good
        assert (error.step, len(error.rows)) == (self.last_good + 1, 2)
        assert set(error.rows) <= {0, 1, 2, 3}
        assert_numbers(backend, tmp_path / "stopped" / f"checkpoint-{self.last_good}")

    def test_a_step_that_is_no_number_can_be_skipped(self, backend, job, tmp_path):
        skipping = run(backend, job(tmp_path / "skipped", on_nan="skip", save_steps=1, **self.beyond))

        assert [(step.step, step.skipped) for step in skipping.steps] == [
            (number, int(number > self.last_good)) for number in (1, 2, 3, 4)
        ]
        assert skipping.facts["steps_without_effect"] == 0
        result = tmp_path / "skipped" / "adapter"
        assert_numbers(backend, result)
        assert backend.tensors(result) == backend.tensors(tmp_path / "skipped" / f"checkpoint-{self.last_good}")

    def test_what_goes_back_keeps_no_checkpoint_so_near(self, backend, job, tmp_path):
        _, error = failing(backend.train(job(tmp_path / "back", on_nan="rollback", save_steps=4, **self.beyond)))

        assert isinstance(error, NotFiniteError)
        assert not list((tmp_path / "back").glob("checkpoint-*"))

    def test_whoever_ignores_it_trains_to_the_end(self, backend, job, tmp_path):
        ignoring = run(backend, job(tmp_path / "on", on_nan="ignore", **self.beyond))

        assert [(step.step, step.skipped) for step in ignoring.steps] == [(1, 0), (2, 0), (3, 0), (4, 0)]

    def test_a_checkpoint_has_the_state_that_the_backend_names_and_its_record(self, backend, job, tmp_path):
        done = run(backend, job(tmp_path, identity=IDENTITY, lr_scheduler_type="linear", warmup_steps=1))
        assert backend.checkpoint_files
        for step in (2, 4):
            folder = tmp_path / f"checkpoint-{step}"
            assert all(any(folder.glob(pattern)) for pattern in backend.checkpoint_files)
            written = [(folder / name).stat().st_mtime_ns for name in (identity.FILE, "trainer_state.json")]
            assert written == sorted(written), (
                "a checkpoint that is whole without its record would pass for an older one"
            )
            record = identity.read(folder)
            assert record is not None
            assert record.training == Record.model_validate_json(IDENTITY).training
            assert (record.past.steps_watched, record.past.plans) == (step, ((0, 4),))
            assert record.past.first_move == done.facts.get("first_move")

    def test_the_record_of_an_interruption_knows_the_steps_taken(self, backend, job, tmp_path):
        run(backend, job(tmp_path, identity=IDENTITY, save_strategy="no", should_stop=lambda: True))
        record = identity.read(tmp_path / "checkpoint-1")
        assert record is not None
        assert (record.past.steps_watched, record.past.plans) == (1, ((0, 4),))

    def test_resuming_at_the_last_step_gives_its_result(self, backend, job, trained, tmp_path):
        rest = run(backend, job(tmp_path, resume=trained.out / "checkpoint-4"))
        assert rest.steps == []
        assert (rest.facts["steps"], rest.facts["resumed_from"], rest.facts["stopped"]) == (4, 4, False)
        assert rest.facts.keys() >= FACTS
        assert backend.tensors(tmp_path / "adapter") == backend.tensors(trained.out / "adapter")

    def test_a_checkpoint_beyond_the_plan_is_refused(self, backend, job, trained, tmp_path):
        with pytest.raises(UsageError, match="the checkpoint is of step 4, and the recipe plans 3 steps"):
            run(backend, job(tmp_path, resume=trained.out / "checkpoint-4", max_steps=3))

    def test_a_training_resumed_for_longer_follows_the_new_plan_at_once(self, backend, job, options, tmp_path):
        plan = {"lr_scheduler_type": "linear", "warmup_steps": 1}
        short = run(backend, job(tmp_path / "short", **plan))
        rest = run(backend, job(tmp_path / "long", **plan, max_steps=8, resume=short.out / "checkpoint-4"))
        wanted = [learning_rate("linear", options["learning_rate"], 1, step, 8) for step in range(5, 9)]
        assert [step.learning_rate for step in rest.steps] == pytest.approx(wanted, rel=1e-9)
        assert rest.facts["planned_steps"] == 8

    def test_a_step_that_is_saved_is_logged(self, backend, job, tmp_path):
        seldom = run(backend, job(tmp_path, logging_steps=50, max_steps=5))
        assert {2, 4, 5} <= {step.step for step in seldom.steps}
        assert sum(len(step.rows) for step in seldom.steps) == 10

    def test_save_steps_and_save_total_limit_are_honoured(self, backend, job, tmp_path):
        run(backend, job(tmp_path, save_steps=1, save_total_limit=2))
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


class BackendContract(TrainingContract):
    """All of it: SFT and DPO."""

    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls) -> Path:
        raise NotImplementedError("a subclass gives a JSONL file of at least 2 DPO rows")

    # -- DPO ------------------------------------------------------------------------------------------------------

    def test_dpo_starts_at_ln_2_and_its_margins_grow(self, backend, job, trained, pairs, tmp_path):
        size = len(read(pairs))
        aligned = run(
            backend,
            job(
                tmp_path,
                objective="dpo",
                rows=pairs,
                adapter=trained.out / "adapter",
                per_device_train_batch_size=size,
                beta=0.1,
                loss_type="sigmoid",
                save_strategy="no",
            ),
        )
        assert aligned.losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert aligned.losses[-1] < aligned.losses[0]
        first, last = aligned.steps[0].extra, aligned.steps[-1].extra
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert last["rewards/margins"] > first["rewards/margins"]
        assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-3)
        assert 0 <= last["rewards/accuracies"] <= 1
