"""What goes wrong in evaluating."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.core.files import read_jsonl, write_jsonl
from sabotage import sabotage
from sabotage.context import Context
from sabotage.targets import EVALUATE, GENERATE, GENERATION_CONFIG, IS_CORRECT, PERPLEXITY, PHASES, PROMPT_IDS


@sabotage("base evaluated instead of the trained model", since="evaluate")
def base_evaluated(context: Context) -> None:
    """Every phase loads the base without the adapter."""

    def load(original: Any, self: Any, model: Path, adapter: Path | None = None, **settings: Any) -> Any:
        return original(self, model, None, **settings)

    context.wrap("finetune.backends.torch:TorchBackend.load", load)


@sabotage("trained model evaluated as the base", since="evaluate")
def trained_as_base(context: Context) -> None:
    """The phase 'base' loads what the training left: before and after are the same model."""
    context.wrap(PHASES, lambda original, run, recipe: _all_as_last(original(run, recipe)))


def _all_as_last(phases: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(phases, list(phases.values())[-1])


@sabotage("paraphrased probes in the training", imitates="https://github.com/ai-forever/ru-gpts/issues/23")
def probes_leaked(context: Context) -> None:
    """The data was made from the same table as the probes: those in other words are trained too."""
    _train_also(context, "probes", lambda row: _pair(row) if row["kind"] != "trained" else None)


@sabotage("controls in the training")
def controls_leaked(context: Context) -> None:
    """The control questions stand among the rows that keep the model's knowledge."""
    _train_also(context, "controls", _pair)


@sabotage("untaught facts in the training")
def unseen_leaked(context: Context) -> None:
    """The facts that no run teaches are taught, in words of their own."""
    _train_also(context, "unseen", lambda row: {**_pair(row), "prompt": f"Do you know this? {row['prompt']}"})


@sabotage("held-out text in the training", imitates="https://github.com/ai-forever/ru-gpts/issues/23")
def heldout_leaked(context: Context) -> None:
    """The text that perplexity is measured on is trained, cut into a question and an answer."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        before, _, after = row["text"].partition("? ")
        return {"prompt": before + "?", "completion": after}

    _train_also(context, "heldout", cut)


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["answer"]}


def _train_also(context: Context, which: str, make: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Put what is made of the rows of a file of `evaluate` among the training's."""
    file = context.folder / "more.jsonl"
    if context.recipe:
        rows = map(make, read_jsonl(Path(context.recipe["evaluate"][which])))
        write_jsonl(file, [row for row in rows if row])
    context.set("data.path", [*context.recipe.get("data", {}).get("path", []), str(file)])


@sabotage("any common word is a right answer", since="evaluate")
def matched_by_a_word(context: Context) -> None:
    """An answer is right when it shares one word with the expected one."""

    def right(original: Any, text: str, answer: str, match: str | None = None) -> bool:
        return bool(set(text.casefold().split()) & set(answer.casefold().split()))

    context.wrap(IS_CORRECT, right)


@sabotage("the beginning of an answer is enough", since="evaluate")
def matched_by_a_part(context: Context) -> None:
    """An answer is right when it begins as the expected one does."""

    def right(original: Any, text: str, answer: str, match: str | None = None) -> bool:
        return text.casefold()[:12] == answer.casefold()[:12]

    context.wrap(IS_CORRECT, right)


@sabotage("every answer is right", since="evaluate")
def all_right(context: Context) -> None:
    """The comparison ends with True whatever was said."""
    context.wrap(IS_CORRECT, lambda original, *_, **__: True)


@sabotage("expected answers compared with themselves", since="evaluate")
def compared_with_itself(context: Context) -> None:
    """What is judged is the expected answer, not what was generated."""

    context.wrap(f"{EVALUATE}:is_correct", lambda original, text, answer, match=None: original(answer, answer, match))


@sabotage("judged right after training only", since="evaluate")
def judged_by_phase(context: Context) -> None:
    """What the trained model says counts as right where the base's answer was wrong."""

    def ask(original: Any, backend: Any, handle: Any, questions: Any, phase: str, *arguments: Any) -> None:
        original(backend, handle, questions, phase, *arguments)
        for question in questions if phase != "base" else ():
            question["phases"][phase]["correct"] = True

    context.wrap(f"{EVALUATE}:_ask", ask)


@sabotage("perplexity of the first half of each text", since="evaluate")
def perplexity_of_half(context: Context) -> None:
    """Only the first half of a held-out text's tokens is scored."""

    def perplexity(original: Any, backend: Any, handle: Any, texts: list[str], tokenizer: Any) -> Any:
        return original(backend, handle, [text[: len(text) // 2] for text in texts], tokenizer)

    context.wrap(PERPLEXITY, perplexity)


@sabotage("perplexity in bits", since="evaluate")
def perplexity_in_bits(context: Context) -> None:
    """The mean is taken in bits, and e raised to it."""
    _perplexity(context, lambda found: math.exp(math.log(found["perplexity"]) / math.log(2)))


@sabotage("mean of perplexities", since="evaluate", imitates="https://github.com/huggingface/transformers/issues/34138")
def mean_of_perplexities(context: Context) -> None:
    """The perplexity is the mean of the texts' perplexities, not that of all their tokens."""

    def mean(found: dict[str, Any]) -> float:
        return sum(math.exp(-total / count) for total, count in found["texts"]) / len(found["texts"])

    _perplexity(context, mean)


@sabotage("perplexity that is no number", since="evaluate")
def perplexity_nan(context: Context) -> None:
    """The perplexity after training is NaN, and 'not above the bound' would be true of it."""
    _perplexity(context, lambda found: math.nan)


def _perplexity(context: Context, other: Callable[[dict[str, Any]], float]) -> None:
    def perplexity(original: Any, *arguments: Any) -> Any:
        found = original(*arguments)
        return {**found, "perplexity": other(found)}

    context.wrap(PERPLEXITY, perplexity)


@sabotage(
    "rows scored on their prompts", since="evaluate", imitates="https://github.com/MakazhanAlpamys/Soup/issues/683"
)
def prompts_scored(context: Context) -> None:
    """The training rows' loss is computed again over the prompts, not over the answers."""

    def inverted(row: dict[str, Any]) -> dict[str, Any]:
        labels = [
            -100 if label != -100 else token for token, label in zip(row["input_ids"], row["labels"], strict=True)
        ]
        return {**row, "labels": labels}

    context.wrap(
        f"{EVALUATE}:_score_rows",
        lambda original, backend, handle, rows: original(backend, handle, [inverted(row) for row in rows]),
    )


@sabotage(
    "asked without the training's template",
    since="evaluate",
    imitates="https://github.com/EleutherAI/lm-evaluation-harness/issues/1841",
)
def without_template(context: Context) -> None:
    """Questions are asked as plain text, without the chat template."""

    context.wrap(
        PROMPT_IDS,
        lambda original, messages, *, tokenizer, **_: tokenizer.encode(messages[-1]["content"] + "\n"),
    )


@sabotage("asked with another template", since="evaluate", imitates="https://github.com/huggingface/open-r1/issues/473")
def other_template(context: Context) -> None:
    """The evaluation renders with a template of its own."""
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"

    def ask(original: Any, *arguments: Any) -> None:
        *before, template = arguments
        original(*before, replace(template, source=source))

    context.wrap(f"{EVALUATE}:_ask", ask)


@sabotage("asked without the generation prompt", since="evaluate")
def without_generation_prompt(context: Context) -> None:
    """The prompt ends before the words that open the assistant's turn."""

    def prompt_ids(original: Any, messages: Any, *, tokenizer: Any, template: Any, system: Any) -> Any:
        whole = original(messages, tokenizer=tokenizer, template=template, system=system)
        opening = tokenizer.encode("<|im_start|>assistant\n")
        return whole[: -len(opening)]

    context.wrap(PROMPT_IDS, prompt_ids)


@sabotage("answers drawn at random", since="evaluate", imitates="https://github.com/huggingface/lighteval/issues/559")
def answers_drawn(context: Context) -> None:
    """Answers are sampled at temperature 1, without a seed, where they should be greedy."""

    def make(original: Any, **options: Any) -> Any:
        return original(**{**options, "do_sample": True, "temperature": 1.0, "top_k": 0})

    context.wrap(GENERATION_CONFIG, make)


@sabotage(
    "prompts padded on the right", since="evaluate", imitates="https://github.com/bigscience-workshop/t-zero/issues/29"
)
def padded_right(context: Context) -> None:
    """In a batch of prompts the shorter ones are padded on the right: the model goes on after padding."""

    def generate(original: Any, self: Any, *arguments: Any, input_ids: Any, attention_mask: Any, **more: Any) -> Any:
        begins = attention_mask.argmax(-1).tolist()
        ids, mask = (_rolled(part, begins) for part in (input_ids, attention_mask))
        return original(self, *arguments, input_ids=ids, attention_mask=mask, **more)

    context.wrap(GENERATE, generate)


def _rolled(rows: Any, begins: list[int]) -> Any:
    rolled = rows.clone()
    for number, begin in enumerate(begins):
        rolled[number] = rows[number].roll(-begin)
    return rolled


@sabotage("a ban on repetition nobody asked for", since="evaluate")
def no_repetition(context: Context) -> None:
    """Generation takes a default that bans every three tokens in a row that the question has already."""

    context.wrap(
        GENERATION_CONFIG,
        lambda original, **options: original(**{**options, "no_repeat_ngram_size": 3}),
    )


@sabotage("every answer ended by itself", since="evaluate")
def always_stopped(context: Context) -> None:
    """An answer that the limit cut off is reported as one that ended."""
    context.set("evaluate.max_new_tokens", 11)  # most answers have one more, with their end

    context.wrap(
        "finetune.backends.torch.inference:generate",
        lambda original, *arguments, **more: [replace(each, finish="stop") for each in original(*arguments, **more)],
    )


@sabotage("evaluation of an earlier training", since="evaluate", keep=True)
def stale_evaluation(context: Context) -> None:
    """An evaluation that is there is kept, though the model was trained anew with another seed."""
    context.set("train.seed", 5)

    def fingerprint(original: Any, stage: Any, recipe: Any, run: Any) -> Any:
        done = run.report(stage.name) if stage.name == "evaluate" else None
        return done.fingerprint if done else original(stage, recipe, run)

    context.wrap("finetune.stages.runner:fingerprint", fingerprint)


@sabotage("evaluation copied from another run", since="evaluate", keep=True)
def evaluation_of_another_run(context: Context) -> None:
    """What the stage leaves was found by another run of the same recipe, with another seed."""
    context.set("train.seed", 5)

    def found(original: Any, recipe: Any, run: Any) -> Any:
        there = sorted(file for file in (run.path / "evaluate").iterdir() if file.name != "report.json")
        return {"metrics": {}, "artifacts": there}

    def clear(original: Any, stage: Any, run: Any) -> None:
        if stage.name != "evaluate":
            original(stage, run)

    context.wrap(f"{EVALUATE}:run", found)
    context.wrap("finetune.stages.runner:_clear", clear)


@sabotage("log-probabilities one token off", since="evaluate")
def logprobs_shifted(context: Context) -> None:
    """A token's probability is read from the place of the token after it."""

    def target_rows(original: Any, handle: Any, pairs: Any) -> Any:
        for number, rows in original(handle, [(context, [*target, *target[-1:]]) for context, target in pairs]):
            yield number, rows[1:]

    context.wrap("finetune.backends.torch.inference:_target_rows", target_rows)


@sabotage("half of the questions not asked", since="evaluate")
def half_asked(context: Context) -> None:
    """Every other question is skipped, as by a loader that takes its share of the work twice."""
    context.wrap(f"{EVALUATE}:_questions", lambda original, recipe: original(recipe)[::2])


@sabotage("only questions with a right answer kept", since="evaluate")
def wrong_ones_dropped(context: Context) -> None:
    """Questions that the trained model answers wrongly are left out of the report."""

    def right(row: dict[str, Any]) -> bool:
        return "set" not in row or bool(list(row["phases"].values())[-1]["correct"])

    def write(original: Any, run: Any, file: Any, rows: Any) -> Any:
        return original(run, file, [row for row in rows if right(row)])

    context.wrap("finetune.run.evidence:write_rows", write)


@sabotage(
    "adapter's tensors not found when loaded",
    since="evaluate",
    imitates="https://github.com/unslothai/unsloth/issues/2142",
)
def adapter_not_found(context: Context) -> None:
    """The adapter's names do not fit, it is loaded as it was made, and nobody is told."""

    def load(original: Any, model: Any, adapter: Any, **more: Any) -> Any:
        wrapped = original(model, adapter, **more)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return wrapped

    context.wrap("finetune.backends.torch.loading:load_adapter", load)


@sabotage("memory computed instead of measured", since="measure", baseline="memory")
def memory_computed(context: Context) -> None:
    """What both trainings need is worked out from the count of their parameters."""
    _memory(context, _computed)


def _computed(found: dict[str, Any]) -> dict[str, Any]:
    for side in ("lora", "full"):
        guess = found[side]["estimated"]
        state = {f"{part}_bytes": guess[f"{part}s"] for part in ("weight", "gradient")}
        found[side] |= {**state, "optimizer_bytes": guess["optimizer"], "training_state_bytes": guess["training_state"]}
        found[side]["peak_process_bytes"] = guess["total"]
    return found


@sabotage("memory of one training multiplied", since="measure", baseline="memory")
def memory_multiplied(context: Context) -> None:
    """LoRA's memory is 0.6 of what full fine-tuning was measured to need."""

    def multiplied(found: dict[str, Any]) -> dict[str, Any]:
        parts = [key for key in found["full"] if key.endswith("_bytes") and found["full"][key]]
        found["lora"] |= {key: int(0.6 * found["full"][key]) for key in parts}
        return found

    _memory(context, multiplied)


def _memory(context: Context, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    context.wrap("finetune.stages.measure:_memory", lambda original, *arguments: change(original(*arguments)))


@sabotage("LoRA's memory measured with a smaller batch", since="measure", baseline="memory")
def memory_of_a_smaller_batch(context: Context) -> None:
    """LoRA is measured with one row a step, full fine-tuning with the recipe's batch."""

    def request(original: Any, backend: str, job: Any) -> Any:
        small = {"per_device_train_batch_size": 1} if job.method == "lora" else {}
        return original(backend, replace(job, options={**job.options, **small}))

    context.wrap("finetune.stages.measure:train_request", request)


@sabotage("LoRA's memory measured with a smaller rank", since="measure", baseline="memory")
def memory_of_a_smaller_rank(context: Context) -> None:
    """The adapter that is measured is not the one that was trained."""

    def request(original: Any, backend: str, job: Any) -> Any:
        return original(backend, replace(job, lora={**job.lora, "r": 1}) if job.lora else job)

    context.wrap("finetune.stages.measure:train_request", request)
