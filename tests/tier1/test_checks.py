"""Every verdict fails when, and only when, what it guards is broken: an honest run, broken in one place at a time."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import checks
from finetune.checks import NOT_EXAMINED, judge, loss, results, verify, worst
from finetune.core.errors import UsageError
from finetune.core.files import write_json, write_jsonl, write_text
from finetune.recipe.sections import Train
from finetune.run import Run
from support.town import MIB, Rows, as_if_written_so, edit_json, edit_rows, write_memory

EVENTS, LABELS, ANSWERS = "events.jsonl", "prepare/train.jsonl", "evaluate/answers.jsonl"
SCORES, HELDOUT, PAIRS = "evaluate/rows.json", "evaluate/heldout.json", "evaluate/preferences.jsonl"
PREPARED, ACCOUNT = "prepare/preferences.jsonl", "align/rewards.json"
MEMORY, RESUME, FRESH = "measure/memory.json", "measure/resume.json", "measure/fresh.json"
EXPORTS, MATERIAL = "export/exports.json", "compare/material.json"
GREEDY, PROMPTS, SERVING = "evaluate/greedy.json", "evaluate/prompts.jsonl", "measure/serving.json"
FIRST = 5.0  # stands for the first loss, which is left as it was
NOISE = [FIRST, 1.0, 3.0, *[2.0] * 6, 4.2, 0.8, 0.9]

Broken = Callable[[Run], Any]


@dataclass(frozen=True)
class Break:
    """One way to break a run, and the verdicts that must fail, and no others. `settled`: digests follow the edit; `open`: the
    verdicts that it leaves nothing to examine for, and no others."""

    how: str
    do: Broken
    fails: str
    settled: bool = True
    open: str = ""

    @property
    def expected(self) -> set[str]:
        return set(self.fails.split())


# -- ways to break a run -----------------------------------------------------------------------------------------------


def steps_of(stage: str, change: Callable[[Rows], Rows | None]) -> Broken:
    """The logged steps of a stage, changed as if it had trained so: its own log and its report go with them."""

    def do(run: Run) -> None:
        taken: Rows = []

        def events(rows: Rows) -> Rows:
            steps = [row for row in rows if row["event"] == "step" and row["stage"] == stage]
            changed = change(steps)
            taken.extend(steps if changed is None else changed)
            others = [row for row in rows if row not in steps]
            place = rows.index(steps[0])
            return [*others[:place], *taken, *others[place:]]

        edit_rows(run, EVENTS, events)
        told = [{key: value for key, value in step.items() if key not in ("event", "stage", "prev")} for step in taken]
        write_json(run.path / stage / "trainer_logs.json", told)
        if told:
            count = json.loads((run.path / stage / "report.json").read_text())["metrics"]["steps"]
            sums = {key: sum(step[key] for step in told) for key in ("tokens", "trained_tokens")}
            seconds = sum(step["seconds"] for step in told)
            speed = {"tokens_per_second": sums["tokens"] / seconds, "seconds_per_step": seconds / count}
            metrics(stage, first_loss=told[0]["loss"], last_loss=told[-1]["loss"], **sums, **speed)(run)

    return do


def losses(*values: float) -> Broken:
    """The logged losses of training; the first stays what it was."""

    def change(steps: Rows) -> None:
        spread = values if len(values) > 1 else values * len(steps)
        assert len(spread) == len(steps)
        for step, value in list(zip(steps, spread, strict=True))[1:]:
            step["loss"] = value

    return steps_of("train", change)


def step(stage: str, number: int, **values: Any) -> Broken:
    """One logged step, counted from 1 (from the end when negative)."""
    return steps_of(stage, lambda steps: steps[number - 1 if number > 0 else number].update(values))


def all_steps(stage: str, change: Callable[[int, dict[str, Any]], Any]) -> Broken:
    def every(steps: Rows) -> None:
        for number, taken in enumerate(steps):
            change(number, taken)

    return steps_of(stage, every)


def without_steps(stage: str, but: int = 0) -> Broken:
    return steps_of(stage, lambda steps: [step for step in steps if step["step"] <= but])


def events(change: Callable[[Rows], Any]) -> Broken:
    """The log, and nothing else."""
    return lambda run: edit_rows(run, EVENTS, lambda rows: (change(rows), rows)[1])


def event(stage: str, kind: str, **values: Any) -> Broken:
    """The last event of a kind of a stage, and nothing else."""
    return events(lambda rows: [r for r in rows if (r["event"], r.get("stage")) == (kind, stage)][-1].update(values))


def logged(**values: Any) -> Broken:
    """One event more, at the end of the log."""
    return lambda run: edit_rows(run, EVENTS, lambda rows: [*rows, {"time": rows[-1]["time"], **values}])


def unlogged(kind: str, stage: str | None = None) -> Broken:
    """The events of a kind (of a stage) taken out of the log."""
    return lambda run: edit_rows(
        run, EVENTS, lambda rows: [r for r in rows if (r["event"], r.get("stage")) != (kind, stage)]
    )


def unlisted(stage: str, name: str) -> Broken:
    """An artifact that the report of its stage does not tell of."""
    return lambda run: edit_json(run, f"{stage}/report.json", lambda report: report["artifacts"].pop(name))


def renamed(phases: dict[str, Any]) -> None:
    """One row scored under the number of none."""
    for scored in phases.values():
        scored["77"] = scored.pop(next(iter(scored)))


def row(change: Callable[[dict[str, Any]], Any], number: int = 0) -> Broken:
    """One prepared row."""
    return lambda run: edit_rows(run, LABELS, lambda rows: change(rows[number]))


def swapped(run: Run) -> None:
    def change(rows: Rows) -> None:
        rows[0]["row"], rows[1]["row"] = rows[1]["row"], rows[0]["row"]

    edit_rows(run, LABELS, change)


def shorter(prepared: dict[str, Any]) -> None:
    """Mask the first half of the answer."""
    places = [place for place, label in enumerate(prepared["labels"]) if label != -100]
    for place in places[: len(places) // 2]:
        prepared["labels"][place] = -100


def end_masked(prepared: dict[str, Any]) -> None:
    prepared["labels"][max(place for place, label in enumerate(prepared["labels"]) if label != -100)] = -100


def answers(change: Callable[[dict[str, Any], dict[str, Any]], Any], which: str = "", kind: str = "") -> Broken:
    """Every answer of a set (of a kind): `change` gets those before and after everything."""

    def each(rows: Rows) -> None:
        chosen = [r for r in rows if which in ("", r["set"]) and kind in ("", r["kind"])]
        assert chosen
        for asked in chosen:
            change(asked["phases"]["base"], asked["phases"]["aligned"])

    return lambda run: edit_rows(run, ANSWERS, each)


def as_before(before: dict[str, Any], after: dict[str, Any]) -> None:
    # The final log-probabilities are what the fresh process is held against, so those before move.
    before["logprob"] = after["logprob"]
    after.update(before)


def only_in_words(before: dict[str, Any], after: dict[str, Any]) -> None:
    before["logprob"] = after["logprob"] + 0.1


def only_in_probability(before: dict[str, Any], after: dict[str, Any]) -> None:
    after["correct"] = False


def learned(before: dict[str, Any], after: dict[str, Any]) -> None:
    before.update(correct=False, logprob=-5.0)
    after.update(correct=True, logprob=-1.0)


def asked(change: Callable[[dict[str, Any]], Any], which: int = -1) -> Broken:
    """One question: the first is a trained one, the last an untaught one, before which the controls stand."""
    return lambda run: edit_rows(run, ANSWERS, lambda rows: (change(rows[which]), rows)[1])


def prompts(change: Callable[[Rows], Any]) -> Broken:
    return lambda run: edit_rows(run, PROMPTS, lambda rows: (change(rows), rows)[1])


def unended(base: dict[str, Any], aligned: dict[str, Any], keep: bool = False, **_: Any) -> None:
    """An answer as long as it may be, without an end; with `keep`, as short as it was."""
    aligned["finish"] = "length"
    if not keep:
        aligned["ids"] = [*aligned["ids"], *[5] * 16][:16]


def beyond(said: dict[str, Any]) -> None:
    said.update(finish="stop", ids=[5] * 16)


def in_bits(phases: dict[str, Any]) -> None:
    for values in phases.values():
        values["perplexity"] **= 1.01


def miscounted(texts: list[list[float]]) -> None:
    """One token more in one text and one less in another."""
    texts[0][1] += 1
    texts[1][1] -= 1


def longer(text: list[float]) -> None:
    text[0] -= 0.002 * text[1]


def memory(sides: str, **values: Any) -> Broken:
    return scores(MEMORY, lambda found: [found[side].update(values) for side in sides.split()])


def heavier(side: dict[str, Any], share: float) -> None:
    """More weights by a share, and the sum of all with them."""
    added = int(side["weight_bytes"] * share)
    side["weight_bytes"] += added
    side["training_state_bytes"] += added


def served(number: int = 1, **values: Any) -> Broken:
    """What the server said to one of the questions (0, 1) or to the conversation (2)."""
    return scores(SERVING, lambda seen: seen["asked"][number]["found"].update(values))


def expected(number: int, **values: Any) -> Broken:
    """What the server's answer is held against; the model itself says what the server said."""
    return scores(SERVING, lambda seen: seen["asked"][number]["expected"].update(values))


def one(which: str, **values: Any) -> Broken:
    """What the server said to one of the special requests."""
    return scores(SERVING, lambda seen: seen[which]["found"].update(values))


def cut(tokens: int, **values: Any) -> Broken:
    """What the server said to the request for a few tokens: so many, which add up."""

    def change(seen: dict[str, Any]) -> None:
        found = seen["length"]["found"]
        found.update(completion_tokens=tokens, total_tokens=found["prompt_tokens"] + tokens, **values)

    return scores(SERVING, change)


def drawn(**values: Any) -> Broken:
    return scores(SERVING, lambda seen: seen["sampling"].update(values))


def lost(count: int) -> Broken:
    def change(rows: Rows) -> None:
        for asked in [r for r in rows if r["set"] == "controls"][:count]:
            asked["phases"]["aligned"]["correct"] = False

    return lambda run: edit_rows(run, ANSWERS, change)


def unknown(count: int) -> Broken:
    def change(rows: Rows) -> None:
        for asked in [r for r in rows if r["set"] == "controls"][:count]:
            asked["phases"]["base"]["correct"] = False

    return lambda run: edit_rows(run, ANSWERS, change)


def scores(name: str, change: Callable[[dict[str, Any]], Any]) -> Broken:
    return lambda run: edit_json(run, name, change)


def only_before(phases: dict[str, Any]) -> None:
    for phase in ("trained", "aligned"):
        del phases[phase]


def pairs(change: Callable[[int, dict[str, Any]], Any]) -> Broken:
    """Every scored pair: `change` gets its number and its phases."""

    def each(rows: Rows) -> None:
        for number, pair in enumerate(rows):
            change(number, pair["phases"])

    return lambda run: edit_rows(run, PAIRS, each)


def gain(phases: dict[str, Any], chosen: float) -> None:
    """Alignment made the chosen answer this much likelier, and left the rejected one."""
    phases["aligned"] = {**phases["trained"], "chosen": phases["trained"]["chosen"] + chosen}


def swap_gains(number: int, phases: dict[str, Any]) -> None:
    """As if the rejected answers had been taught."""
    before, after = phases["trained"], phases["aligned"]
    gains = {key: after[key] - before[key] for key in before}
    after.update(chosen=before["chosen"] + gains["rejected"], rejected=before["rejected"] + gains["chosen"])


def prepared(change: Callable[[dict[str, Any]], Any], number: int = 1) -> Broken:
    """One prepared pair."""
    return lambda run: edit_rows(run, PREPARED, lambda rows: change(rows[number]))


def turned(pair: dict[str, Any]) -> None:
    pair.update(chosen_ids=pair["rejected_ids"], rejected_ids=pair["chosen_ids"])


def doubled(rows: Rows) -> Rows:
    return [*rows, rows[0]]


def rewarded(account: dict[str, Any], factor: float) -> None:
    account.update(chosen=account["chosen"] * factor, rejected=account["rejected"] * factor)


def instead(place: str, source: str) -> Broken:
    """The tensors of another directory."""

    def do(run: Run) -> None:
        write_text(run.path / place / "adapter.json", (run.path / source / "adapter.json").read_text())

    return do


def emptied(name: str) -> Broken:
    return lambda run: (run.path / name).unlink()


def configured(stage: str, **values: Any) -> Broken:
    return lambda run: edit_json(run, f"{stage}/adapter/adapter_config.json", lambda config: config.update(values))


def unsaid(stage: str, key: str) -> Broken:
    return lambda run: edit_json(run, f"{stage}/adapter/adapter_config.json", lambda config: config.pop(key))


def zero_b(adapter: dict[str, Any]) -> None:
    for context in adapter["contexts"][:: len("qkvo")]:  # those of the first of the four modules
        context[-1] = [0.0] * len(context[-1])


def not_finite(model: str, value: float) -> Broken:
    """One weight of a model of the run."""

    def change(weights: dict[str, Any]) -> None:
        row = weights["table"][0][2]
        row[next(iter(row))] = value

    return lambda run: edit_json(run, f"{model}/fake_model.json", change)


def untrained(run: Run) -> None:
    shutil.rmtree(run.path / "train" / "adapter")
    shutil.copytree(run.path / "train" / "initial", run.path / "train" / "adapter")


def metrics(stage: str, **values: Any) -> Broken:
    return lambda run: edit_json(run, f"{stage}/report.json", lambda report: report["metrics"].update(values))


def untold(stage: str, *keys: str) -> Broken:
    """Numbers taken out of a report."""
    return lambda run: edit_json(
        run, f"{stage}/report.json", lambda report: [report["metrics"].pop(key) for key in keys]
    )


def more(stage: str, key: str, by: float) -> Broken:
    """A number of a report that is a little off."""

    def change(report: dict[str, Any]) -> None:
        report["metrics"][key] += by

    return lambda run: edit_json(run, f"{stage}/report.json", change)


def trained_log(change: Callable[[Rows], Any], stage: str = "train") -> Broken:
    """What the stage wrote of its steps when it was done, and nothing else."""
    return lambda run: edit_json(run, f"{stage}/trainer_logs.json", change)


def base(change: Callable[[Path], Any], *, recorded: bool = False) -> Broken:
    """The run's base model, in a copy; `recorded`: as if it had been so when it was fetched."""

    def do(run: Run) -> None:
        import hashlib

        found = json.loads((run.path / "fetch" / "model.json").read_text(encoding="utf-8"))
        own = Path(shutil.copytree(found["base"], run.path / "own-base"))
        found["base"] = str(own)
        for adapter in run.path.glob("*/adapter/adapter_config.json"):
            write_json(adapter, {**json.loads(adapter.read_text()), "base_model_name_or_path": str(own)})
        change(own)
        if recorded:
            for name, fact in found["files"].items():
                fact["sha256"] = hashlib.sha256((own / name).read_bytes()).hexdigest()
        write_json(run.path / "fetch" / "model.json", found)

    return do


def config(**values: Any) -> Broken:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return base(change, recorded=True)


def gone(name: str) -> Broken:
    def do(run: Run) -> None:
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def other_case(prepared: dict[str, Any]) -> None:
    """The first word of the answer, as if the data had been put into lower case."""
    place = next(place for place, label in enumerate(prepared["labels"]) if label != -100)
    prepared["labels"][place] = 5


def other_data(run: Run) -> None:
    """What the rows were made from says something else now: the file beside the line number is what counts."""
    edit_rows(run, LABELS, lambda rows: [{**r, "row": r["row"] + 100} for r in rows])


def retrained(run: Run) -> None:
    """`finetune train` alone, after everything else."""
    run.write_report(run.require("train"))


def touched(name: str) -> Broken:
    return lambda run: write_text(run.path / name, (run.path / name).read_text() + " ")


def later(values: dict[str, float], by: float) -> None:
    values[max(values, key=int)] += by


DAMAGED = "stages_finished artifacts_intact records_whole told_of"  # by a report that cannot be read
OF_LABELS = "trained_tokens labels_aligned end_of_turn_trained labels_are_answers prompts_as_served"
OF_FALL = "loss_convergence loss_beyond_noise"
REPORTED = {"first_loss": 1e-6, "last_loss": 1e-6, "tokens": 1, "trained_tokens": -1, "planned_steps": 1,
            "tokens_per_second": 10**6, "seconds_per_step": 0.01}  # fmt: skip
PREPARED_SO = {"vocab_size": 1, "rows": 1, "eval_rows": 1, "tokens": -1, "trained_tokens": 1, "trained_tokens_min": 1,
               "longest_row": 1, "lost_answer_tokens": 1, "unigram_entropy": 1e-6, "preference_rows": 1}  # fmt: skip
TWO_LOGS = [
    Break(f"a {key} that the trainer's own log has otherwise",
          trained_log(lambda log, key=key, value=value: log[4].update({key: value})),
          "log_as_trained")
    for key, value in {"loss": 0.5, "learning_rate": 1.1e-4, "grad_norm": 0.1, "seconds": 9.5, "tokens": 5,
                       "trained_tokens": 3, "epoch": 1.25, "rows": [5], "time": "2026-01-01T00:00:00.000Z",
                       "of_nobody": 1}.items()
]  # fmt: skip
NO_STEP = (
    f"loss_finite gradients_finite {OF_FALL} loss_start loss_end loss_is_of_answers rows_trained tokens_as_prepared "
    "trained_to_the_end learning_rate_as_asked log_as_trained report_as_logged resume_losses"
)
NO_ROWS = "loss_is_of_answers loss_confirmed adapter_effect rows_scored"
UNCONFIRMED = "dpo_rewards_confirmed dpo_loss_confirmed"
NO_LEARNING = "learned_as_trained learned_paraphrased learned_net"
OTHER_ROWS = "labels_are_answers prompts_as_served"
NO_REPORT = (  # of the training: all that stands on it
    f"{DAMAGED} frozen_identical gradients_clipped learning_rate_as_asked log_as_trained report_as_logged resume_losses "
    "one_training resume_parameters resume_weights rows_trained saved_last saved_whole settings_as_asked "
    "steps_move_weights trained_to_the_end weights_precision"
)
NO_BEGIN = "report_as_logged dpo_report_as_logged"
OTHER_TEMPLATE = "prepared_as_reported fresh_process"
NO_TOKENIZER = "saved_tokenizer sizes_as_reported artifacts_intact told_of"
NOT_FINITE = "weights_finite sizes_as_reported"
NO_ADAPTER = "parameters_changed lora_b_nonzero lora_coverage saved_whole saved_last adapter_config artifacts_intact"
NO_ADAPTER += " weights_finite"
ENDED_EARLY = "trained_to_the_end log_as_trained report_as_logged saved_last"
LOST = "rows_prepared rows_trained rows_scored tokens_as_prepared prepared_as_reported asked_alike"
TWICE = "rows_prepared rows_trained prepared_as_reported memory_same_work"
EMPTY_ROWS = f"{OF_LABELS} {LOST} memory_same_work trained_to_the_end"
NO_PREPARED = (
    f"{OF_LABELS} {LOST} report_as_logged saved_tokenizer nothing_leaked asked_as_trained memory_same_work "
    "memory_as_estimated memory_as_stored memory_efficiency trained_to_the_end artifacts_intact"
)
SEEN = {"rows": [0, 1]}
LEARNED = f"{NO_LEARNING} stops_by_itself"
REREAD = "answers_are_greedy evaluated_as_reported"
OTHER_QUESTIONS = "asked_as_trained answers_are_greedy asked_alike"
JUDGED = "judged_again evaluated_as_reported"
UNENDED = "stops_by_itself answers_are_greedy answers_as_said serving_answers"
NOT_ALL = f"every_question_asked {OTHER_QUESTIONS}"
REORDERED = "pairs_are_data every_pair_scored"
DOUBLED = f"pairs_trained prepared_as_reported {REORDERED}"
OF_PAIRS = f"pairs_trained pair_tokens dpo_report_as_logged {UNCONFIRMED}"
NO_PAIRS = f"{REORDERED} pairs_differ {OF_PAIRS} prepared_as_reported saved_tokenizer artifacts_intact"
NO_ALIGNMENT = f"{OF_PAIRS} dpo_start dpo_margin_grows dpo_learning_rate_as_asked dpo_log_as_trained"
NO_SIZE = "memory_efficiency memory_as_stored memory_as_estimated"
LEARNING_GONE = f"{LEARNED} every_question_asked {OTHER_QUESTIONS} evaluated_as_reported judged_again judged_strictly"
LEARNING_GONE += " answers_as_said controls_kept serving_answers fresh_process"
HELD_OUT = "heldout_perplexity heldout_whole heldout_confirmed"
SCORED = f"dpo_prefers_chosen dpo_margin {UNCONFIRMED}"
UNMEASURED = "memory_same_work memory_as_stored memory_efficiency memory_as_estimated"
UNTRIED = "artifacts_intact counts_as_reported"  # of an experiment whose file is gone
UNSERVED = (
    "serving_prompts serving_answers serving_conversations serving_stops serving_max_tokens serving_temperature "
    "serving_seed serving_top_p serving_streaming serving_usage serving_special_tokens"
)

BREAKS = [
    # loss
    Break("constant losses", losses(4.9), f"{OF_FALL} loss_end resume_losses"),
    Break("noise whose last loss is far below its first", losses(*NOISE), "loss_beyond_noise resume_losses"),
    Break("a loss that falls by 3 %", losses(*[4.93 - n / 75 for n in range(12)]), "loss_convergence loss_end resume_losses"),
    Break("a loss that stays above word frequencies", losses(*[4.9 - n / 7 for n in range(12)]), "loss_end resume_losses"),
    Break("NaN in the middle", step("train", 6, loss=math.nan), "loss_finite"),
    Break("a gradient that is NaN", step("train", 6, grad_norm=math.nan), "gradients_finite"),
    Break("a gradient whose norm nobody told", step("train", 6, grad_norm=None), "gradients_finite"),
    Break("infinity in the middle", step("train", 6, loss=math.inf), "loss_finite"),
    Break(
        "NaN at the end",
        step("train", -1, loss=math.nan),
        f"loss_finite {OF_FALL} loss_end resume_losses",
    ),
    Break("minus infinity at first", step("train", 1, loss=-math.inf), f"loss_finite {OF_FALL} loss_start loss_is_of_answers"),
    Break("minus infinity at the end", step("train", -1, loss=-math.inf), f"loss_finite {OF_FALL} loss_end resume_losses"),
    Break("first loss above a guess", step("train", 1, loss=10.0), "loss_start loss_is_of_answers"),
    Break("a vocabulary that nobody counted", untold("prepare", "uniform_entropy"), "loss_start prepared_as_reported"),
    Break("words that nobody counted", untold("prepare", "unigram_entropy"), "loss_end prepared_as_reported"),
    Break(
        "invented losses",
        all_steps("train", lambda n, s: s.update(loss=s["loss"] * 0.8)),
        "loss_is_of_answers resume_losses",
    ),
    Break("a mean over everything", lambda run: everything(run), "loss_is_of_answers rows_scored"),
    Break("three steps", without_steps("train", but=3), f"{OF_FALL} loss_end log_as_trained report_as_logged resume_losses"),
    Break("no step", without_steps("train"), NO_STEP),
    Break("rows scored worse after", scores(SCORES, lambda s: double(s["trained"], s["base"])), "loss_confirmed"),
    Break(
        "training that changed no score",
        scores(SCORES, lambda s: s.update(trained=s["base"])),
        "loss_confirmed adapter_effect",
    ),
    Break("rows scored before only", scores(SCORES, lambda s: s.pop("trained")), NO_ROWS),
    Break("a row not scored after", scores(SCORES, lambda s: s["trained"].popitem()), NO_ROWS),
    Break("no rows scored", gone(SCORES), f"{NO_ROWS} artifacts_intact"),
    # labels
    Break("labels shifted by one", row(lambda r: r["labels"].append(r["labels"].pop(0))), "labels_aligned asked_as_trained"),
    Break("a prompt that is trained", row(lambda r: r.update(labels=r["input_ids"])),
          "labels_are_answers tokens_as_prepared prepared_as_reported rows_scored"),
    Break("an end of turn that is masked", row(end_masked),
          "end_of_turn_trained tokens_as_prepared prepared_as_reported rows_scored"),
    Break("half an answer masked", row(shorter),
          "labels_are_answers prompts_as_served tokens_as_prepared asked_as_trained prepared_as_reported rows_scored"),
    Break(
        "a row without labels",
        row(lambda r: r.update(labels=[-100] * len(r["labels"]))),
        "trained_tokens end_of_turn_trained labels_are_answers tokens_as_prepared prepared_as_reported rows_scored",
    ),
    Break("answers swapped between rows", swapped,
          "labels_are_answers prompts_as_served asked_as_trained rows_prepared rows_scored"),
    Break("rows of no data file", other_data, f"{OTHER_ROWS} rows_prepared rows_trained rows_scored tokens_as_prepared"),
    Break("no prepared rows", gone(LABELS), NO_PREPARED),
    Break("an empty file of rows", lambda run: write_jsonl(run.path / LABELS, []), EMPTY_ROWS),
    Break("an answer in another case", row(lambda r: other_case(r)), "labels_are_answers labels_aligned prepared_as_reported"),
    Break(
        "a prompt that begins otherwise",
        row(lambda r: r["input_ids"].__setitem__(0, 5)),
        "prompts_as_served asked_as_trained asked_alike",
    ),
    # rows
    Break("a row of the data lost", lambda run: edit_rows(run, LABELS, lambda rows: [*rows[:2], *rows[3:]]), LOST),
    Break("a row prepared twice", lambda run: edit_rows(run, LABELS, lambda rows: [*rows, rows[0]]), TWICE),
    Break("the same rows at every step", all_steps("train", lambda n, s: s.update(SEEN)), "rows_trained tokens_as_prepared"),
    Break("a step that trained fewer tokens", step("train", 3, trained_tokens=7), "tokens_as_prepared"),
    Break("a training that ended early", metrics("train", steps=9), ENDED_EARLY),
    # parameters
    Break("the adapter of before training", untrained, "parameters_changed lora_b_nonzero saved_last"),
    Break(
        "one module whose B stayed zero",
        lambda run: edit_json(run, "train/adapter/adapter.json", zero_b),
        "lora_b_nonzero saved_last",
    ),
    Break("adapters in half the layers", config(num_hidden_layers=2), "lora_coverage"),
    Break("a frozen weight that moved", metrics("train", frozen_sha256_after="0" * 64), "frozen_identical"),
    Break("weights in half of the precision", metrics("train", weight_bytes=10**4), "weights_precision"),
    Break("frozen weights not looked at", metrics("train", frozen_sha256_before=""), "frozen_identical"),
    Break("a frozen weight that moved in alignment", metrics("align", frozen_sha256_after="0" * 64), "dpo_frozen_identical"),
    Break("frozen weights of alignment not looked at", metrics("align", frozen_sha256_before=""), "dpo_frozen_identical"),
    Break(
        "a base model changed on disk",
        base(lambda own: (own / "tokenizer_config.json").write_text('{"chat_template": null}')),
        "base_intact",
    ),
    Break("a base file gone", base(lambda own: (own / "fake_model.json").unlink()), "base_intact"),
    Break("no adapter", gone("train/adapter"), NO_ADAPTER),
    # optimizer
    Break("steps that moved nothing", metrics("train", steps_without_effect=3), "steps_move_weights"),
    Break("steps nobody looked at", untold("train", "steps_without_effect"), NO_REPORT),
    Break("a step of alignment that moved nothing", metrics("align", steps_without_effect=1), "dpo_steps_move_weights"),
    Break("another training half-way", metrics("train", changed=["from step 6: seed 0 -> 1"]), "one_training"),
    Break("another alignment half-way", metrics("align", changed=["from step 3: seed 0 -> 1"]), "dpo_one_training"),
    Break("a checkpoint that says nothing", metrics("align", unexamined=[3]), "", open="dpo_one_training"),
    Break("a learning rate off the schedule", step("train", 3, learning_rate=0.5), "learning_rate_as_asked"),
    Break("a learning rate that is no number", step("train", 3, learning_rate=math.nan), "learning_rate_as_asked"),
    Break("a learning rate a thousandth off",
          all_steps("train", lambda n, s: s.update(learning_rate=1.001 * s["learning_rate"])), "learning_rate_as_asked"),
    Break("alignment off the schedule", step("align", 2, learning_rate=0.5), "dpo_learning_rate_as_asked"),
    Break("another weight decay", metrics("train", weight_decay=0.1), "settings_as_asked"),
    Break("another beta", metrics("train", adam_beta1=0.9, adam_beta2=0.95), "settings_as_asked"),
    Break("an optimizer with half of the parameters", metrics("train", optimized_parameters=7), "settings_as_asked"),
    Break("a dropout that was not there", metrics("train", lora_dropout=0.5), "settings_as_asked"),
    Break("a dropout that nobody told", untold("train", "lora_dropout"), "settings_as_asked"),
    Break("a weight decay that nobody told", untold("train", "weight_decay"), "settings_as_asked"),
    Break("an Adam that nobody told of", untold("align", "adam_beta2"), "dpo_settings_as_asked"),
    Break("gradients that nobody measured", metrics("train", clipped_norm=None), "gradients_clipped"),
    Break("another weight decay in alignment", metrics("align", weight_decay=0.1), "dpo_settings_as_asked"),
    Break("gradients not clipped", metrics("train", clipped_norm=3.0), "gradients_clipped"),
    Break("gradients a twentieth beyond", metrics("train", clipped_norm=1.05), "gradients_clipped"),
    Break("gradients of no number", metrics("train", clipped_norm=math.nan), "gradients_clipped"),
    Break("gradients not clipped in alignment", metrics("align", clipped_norm=3.0), "dpo_gradients_clipped"),
    # reports
    *TWO_LOGS,
    Break("a step that the trainer's own log lacks", trained_log(lambda log: log.pop()), "log_as_trained"),
    Break("a margin that the trainer's own log has otherwise",
          trained_log(lambda log: log[2].update({"rewards/margins": 0.5}), "align"), "dpo_log_as_trained"),
    Break("no log of the trainer's own", gone("train/trainer_logs.json"), "log_as_trained artifacts_intact"),
    Break("a step that nobody logged", steps_of("train", lambda steps: steps[:5] + steps[6:]), "log_as_trained"),
    Break("a step logged twice", steps_of("train", lambda steps: [*steps[:6], steps[5], *steps[6:]]),
          "log_as_trained"),
    Break("steps in another order", steps_of("train", lambda steps: [*steps[:5], steps[6], steps[5], *steps[7:]]),
          "log_as_trained"),
    Break("a step beyond the last", step("train", -1, step=13), "log_as_trained report_as_logged resume_losses"),
    *(Break(f"a {key} that is reported otherwise", more("train", key, by), "report_as_logged") for key, by in REPORTED.items()),
    Break("steps that were not watched", more("train", "steps_watched", -1), "report_as_logged"),
    Break("a plan of another length", metrics("train", plans=[[0, 12], [6, 9]]), "report_as_logged"),
    Break("alignment's tokens reported otherwise", more("align", "tokens", 1), "dpo_report_as_logged"),
    Break("a report of a training that was stopped", metrics("train", stopped=True), "report_as_logged"),
    Break("a speed that nobody told", metrics("train", tokens_per_second=None), "report_as_logged"),
    Break("a training said to be resumed", metrics("train", resumed_from=3), "report_as_logged"),
    Break("a training logged as resumed", event("train", "training", resumed_from=3), "report_as_logged"),
    Break("a training whose begin nobody logged",
          lambda run: edit_rows(run, EVENTS, lambda rows: [r for r in rows if r["event"] != "training"]), NO_BEGIN),
    *(Break(f"a {key} of the data that is reported otherwise", more("prepare", key, by), "prepared_as_reported")
      for key, by in PREPARED_SO.items()),
    Break("a vocabulary reported otherwise", more("prepare", "uniform_entropy", 1e-6), "prepared_as_reported"),
    Break("a template reported otherwise", metrics("prepare", template_sha256="0" * 64), "prepared_as_reported"),
    Break("a template noted otherwise", scores("prepare/template.json", lambda t: t.update(sha256="0" * 64)), OTHER_TEMPLATE),
    Break("rows that nobody counted", untold("prepare", "rows"), "prepared_as_reported"),
    Break("bytes of the model reported otherwise", more("fetch", "bytes", 1), "sizes_as_reported"),
    Break("parameters of the model reported otherwise", more("fetch", "parameters", 1), "sizes_as_reported"),
    Break("parameters of the model not reported", untold("fetch", "parameters"), "sizes_as_reported"),
    Break("bytes of the merged model reported otherwise", more("merge", "bytes", -1), "sizes_as_reported"),
    # records
    Break("a kind of event that nobody knows", logged(event="dreamt"), "records_whole"),
    Break("an event that says more than it may", event("merge", "stage_finished", mood="fine"), "records_whole"),
    Break("a template noted with more than its digest", scores("prepare/template.json", lambda t: t.update(of_nobody=1)),
          "records_whole prepared_as_reported fresh_process"),
    Break("a stage that took longer in the log", event("merge", "stage_finished", seconds=99.0), "told_of"),
    Break("a stage that began with other inputs", event("merge", "stage_started", fingerprint="0" * 64), "told_of"),
    Break("a stage whose end nobody logged", unlogged("stage_finished", "merge"), "told_of"),
    Break("a stage whose begin nobody logged", unlogged("stage_started", "merge"), "told_of"),
    Break("a recipe whose storing nobody logged", unlogged("recipe"), "told_of"),
    Break("a training of another objective", event("train", "training", objective="dpo"), "told_of"),
    Break("an artifact that its report does not list", unlisted("evaluate", GREEDY), "told_of"),
    Break("a row scored that was not prepared", scores(SCORES, renamed), "rows_scored"),
    Break("tokens of a row counted otherwise", scores(SCORES, lambda s: s["trained"]["5"]["all"].__setitem__(1, 9)),
          "rows_scored"),
    Break("a phase that no row is scored in", scores(SCORES, lambda s: s.update(other=s["base"])), "rows_scored"),
    Break("an experiment that nobody reported", scores("measure/report.json", lambda r: r["metrics"]["experiments"].pop()),
          "counts_as_reported"),
    Break("more exports reported than there are", more("export", "exports", 1), "counts_as_reported"),
    Break("bytes of exports reported otherwise", more("export", "bytes", 1), "counts_as_reported"),
    Break("more exports tried than there are", more("rehearse", "exports", 1), "counts_as_reported"),
    Break("a comparison that is not there", more("compare", "hops", 1), "counts_as_reported"),
    # seal
    Break("a report changed afterwards", metrics("train", gradient_bytes=7), "sealed", settled=False),
    Break("an event changed afterwards", event("train", "training", objective="other"), "sealed told_of", settled=False),
    # learning
    Break("nothing learned", answers(as_before, "probes"), f"{NO_LEARNING} stops_by_itself {REREAD} serving_answers"),
    Break("better words, worse probability", answers(only_in_words, "probes"), NO_LEARNING),
    Break("better probability, wrong words", answers(only_in_probability, "probes"), f"{NO_LEARNING} {JUDGED}"),
    Break(
        "nothing learned as trained", answers(only_in_words, "probes", "trained"), "learned_as_trained learned_net"
    ),
    Break("nothing learned in other words", answers(only_in_words, "probes", "paraphrase"), "learned_paraphrased"),
    Break("untrained facts improve as much", answers(learned, "unseen"), f"learned_net {JUDGED}"),
    Break(
        "no untrained facts", lambda run: edit_rows(run, ANSWERS, lambda a: [x for x in a if x["set"] != "unseen"]),
        f"learned_net every_question_asked {OTHER_QUESTIONS} evaluated_as_reported",
    ),
    Break("probes known before", answers(lambda b, a: b.update(correct=True), "probes"), JUDGED, open=NO_LEARNING),
    Break("answers that do not end", answers(unended, "probes"), UNENDED),
    Break("no answers", gone(ANSWERS), f"{LEARNING_GONE} artifacts_intact"),
    Break("no questions", lambda run: write_jsonl(run.path / ANSWERS, []), LEARNING_GONE),
    Break(
        "answers of the base only",
        lambda run: edit_rows(run, ANSWERS, lambda a: [x.update(phases={"base": x["phases"]["base"]}) for x in a] and a),
        f"{LEARNED} every_question_asked {REREAD} controls_kept serving_answers fresh_process",
    ),
    # questions
    Break("a question not asked", lambda run: edit_rows(run, ANSWERS, lambda a: a[:-1]), NOT_ALL),
    Break("a question of no file", lambda run: edit_rows(run, ANSWERS, lambda a: [*a, a[-1]]), NOT_ALL),
    Break("a question not asked in one phase", asked(lambda a: a["phases"].pop("trained")), f"every_question_asked {REREAD}"),
    Break("a question asked in other words", prompts(lambda rows: rows[-1]["ids"].pop()), "asked_as_trained"),
    Break("a trained question asked otherwise", prompts(lambda rows: rows[0]["ids"].pop()), "asked_as_trained"),
    Break("a prompt that nobody kept", prompts(lambda rows: rows.pop()), "asked_as_trained"),
    Break("no prompts kept", gone(PROMPTS), "asked_as_trained artifacts_intact"),
    Break("a question of another kind", asked(lambda a: a.update(kind="told")), "every_question_asked"),
    Break("a question under another name", asked(lambda a: a.update(id="77")), "every_question_asked asked_alike"),
    Break("a text that nobody said", asked(lambda a: a["phases"]["trained"].update(text="Oh.")), "answers_as_said"),
    Break("prompts in another order", prompts(lambda rows: rows.reverse()), "asked_as_trained"),
    Break("a report that says more", metrics("evaluate", trained_correct_base=0.5), "evaluated_as_reported"),
    Break("a number of nobody's", metrics("evaluate", told_correct_base=0.5), "evaluated_as_reported"),
    Break("other answers read again", scores(GREEDY, lambda g: g["base"].update(answers=18)), "answers_are_greedy"),
    Break("fewer tokens read again", scores(GREEDY, lambda g: g["trained"].update(tokens=3)), "answers_are_greedy"),
    Break("a token that nobody said", scores(GREEDY, lambda g: g["base"]["worst"].update(said="x")), "answers_are_greedy"),
    Break("a right answer judged wrong", lost(1), JUDGED),
    Break("a token another was likelier than", scores(GREEDY, lambda g: g["base"].update(gap=0.01)), "answers_are_greedy"),
    Break("a gap of NaN", scores(GREEDY, lambda g: g["aligned"].update(gap=math.nan)), "answers_are_greedy"),
    Break("answers read again in one phase only", scores(GREEDY, lambda g: g.pop("base")), "answers_are_greedy"),
    Break("answers not read again", gone(GREEDY), "answers_are_greedy artifacts_intact"),
    Break("an answer cut off in its midst", asked(lambda a: unended(**a["phases"], keep=True), -4), "answers_are_greedy"),
    Break("an end beyond the last token", asked(lambda a: beyond(a["phases"]["base"])), "answers_are_greedy answers_as_said"),
    # retention
    Break("half the controls lost", lost(2), f"controls_kept {JUDGED}"),
    Break("two controls known before", unknown(2), JUDGED, open="controls_kept"),
    Break(
        "held-out text less likely",
        scores(HELDOUT, lambda s: s["aligned"].update(perplexity=1.6 * s["base"]["perplexity"])),
        "heldout_perplexity heldout_confirmed evaluated_as_reported",
    ),
    Break(
        "a perplexity of NaN",
        scores(HELDOUT, lambda s: s["aligned"].update(perplexity=math.nan)),
        "heldout_perplexity heldout_confirmed evaluated_as_reported",
    ),
    Break("held-out text scored once", scores(HELDOUT, only_before), f"{HELD_OUT} evaluated_as_reported"),
    Break("no held-out text", gone(HELDOUT), f"{HELD_OUT} evaluated_as_reported artifacts_intact"),
    Break("held-out tokens not scored", scores(HELDOUT, lambda s: s["base"].update(tokens=60)), "heldout_whole"),
    Break("held-out tokens scored twice", scores(HELDOUT, lambda s: s["aligned"].update(tokens=500)), "heldout_whole"),
    Break("a perplexity in bits", scores(HELDOUT, in_bits), "heldout_confirmed evaluated_as_reported"),
    Break("held-out text of another model", scores(FRESH, lambda f: longer(f["heldout"][0])), "heldout_confirmed"),
    Break("a text of more tokens", scores(HELDOUT, lambda s: miscounted(s["base"]["texts"])), "heldout_whole"),
    Break("one text scored afresh", scores(FRESH, lambda f: f["heldout"].pop()), "heldout_confirmed"),
    Break("held-out text scored once only", scores(FRESH, lambda f: f.pop("heldout")), "heldout_confirmed"),
    # preference
    Break("a first loss that is not ln 2", step("align", 1, loss=0.69), "dpo_start"),
    Break(
        "no step of alignment",
        without_steps("align"),
        NO_ALIGNMENT,
    ),
    Break(
        "margins that shrink",
        all_steps("align", lambda n, s: s.update({"rewards/margins": -0.1 * n})),
        "dpo_margin_grows",
    ),
    Break("margins not logged", all_steps("align", lambda n, s: s.pop("rewards/margins")), "dpo_margin_grows"),
    Break("aligned scores swapped", pairs(swap_gains), f"dpo_prefers_chosen dpo_margin {UNCONFIRMED}"),
    Break(
        "alignment that changed nothing",
        pairs(lambda n, p: gain(p, 0.0)),
        f"dpo_prefers_chosen dpo_margin {UNCONFIRMED}",
    ),
    Break(
        "one pair won by far",
        pairs(lambda n, p: gain(p, 99.0 if n == 0 else -1.0)),
        f"dpo_prefers_chosen {UNCONFIRMED}",
    ),
    Break("one pair lost by far", pairs(lambda n, p: gain(p, -99.0 if n == 0 else 1.0)), f"dpo_margin {UNCONFIRMED}"),
    Break("pairs not scored after", pairs(lambda n, p: p.pop("aligned")), SCORED),
    Break("pairs not scored before", pairs(lambda n, p: p.pop("trained")), SCORED),
    Break("no pairs scored", gone(PAIRS), f"{SCORED} every_pair_scored artifacts_intact"),
    Break("a pair the wrong way round", prepared(turned), "pairs_are_data"),
    Break("pairs in another order", lambda run: edit_rows(run, PREPARED, lambda rows: rows[::-1]), REORDERED),
    Break("a pair more than the data has", lambda run: edit_rows(run, PREPARED, doubled), DOUBLED),
    Break(
        "a pair of one answer twice",
        prepared(lambda p: p.update(rejected_ids=p["chosen_ids"])),
        "pairs_are_data pairs_differ pair_tokens",
    ),
    Break("no prepared pair", gone(PREPARED), NO_PAIRS),
    Break(
        "half of the pairs taken twice",
        all_steps("align", lambda n, s: s.update(rows=[0, 1, 2])),
        "pairs_trained pair_tokens",
    ),
    Break("pairs whose ends were not trained", step("align", 2, trained_tokens=7), "pair_tokens"),
    Break("rewards by another beta", scores(ACCOUNT, lambda a: rewarded(a, 1.02)), "dpo_rewards_confirmed"),
    Break("a reward of NaN", scores(ACCOUNT, lambda a: rewarded(a, math.nan)), "dpo_rewards_confirmed"),
    Break("another preference loss", scores(ACCOUNT, lambda a: a.update(loss=a["loss"] + 0.05)), "dpo_loss_confirmed"),
    Break("a preference loss of NaN", scores(ACCOUNT, lambda a: a.update(loss=math.nan)), "dpo_loss_confirmed"),
    Break("rewards of another step", scores(ACCOUNT, lambda a: a.update(step=6)), UNCONFIRMED),
    Break("a pair scored twice", lambda run: edit_rows(run, PAIRS, lambda rows: [*rows, rows[0]]), "every_pair_scored"),
    Break("rewards of unknown pairs", scores(ACCOUNT, lambda a: a.update(rows=[0, 99])), UNCONFIRMED),
    Break("rewards of no pair", scores(ACCOUNT, lambda a: a.update(rows=[])), UNCONFIRMED),
    Break("rewards that were not logged", scores(ACCOUNT, lambda a: a.update(rejected=None)), UNCONFIRMED),
    Break("a trainer that was not asked", gone(ACCOUNT), f"{UNCONFIRMED} artifacts_intact"),
    # artifacts
    Break("a stage without a report", gone("merge/report.json"), "stages_finished sizes_as_reported told_of"),
    Break("a training after the evaluation", retrained, "stages_finished"),
    Break("an artifact gone", gone("train/trainer_logs.json"), "artifacts_intact log_as_trained", settled=False),
    Break("an artifact changed", touched("merge/model/config.json"), "artifacts_intact sizes_as_reported", settled=False),
    Break("a file of an artifact gone", gone("merge/model/config.json"), "artifacts_intact sizes_as_reported", settled=False),
    Break("an adapter that lacks parameters", metrics("train", trainable_parameters=10**9),
          "saved_whole settings_as_asked resume_parameters"),
    Break("an adapter that lacks one parameter", more("train", "trainable_parameters", 1),
          "saved_whole settings_as_asked resume_parameters"),
    Break("an aligned adapter that lacks parameters", metrics("align", trainable_parameters=10**9),
          "saved_whole dpo_settings_as_asked"),
    Break("parameters that nobody counted", metrics("train", trainable_parameters=None), NO_REPORT),
    Break("the adapter of an earlier checkpoint", instead("train/adapter", "train/checkpoint-9"), "saved_last"),
    Break("the adapter from before alignment", instead("align/adapter", "train/adapter"), "saved_last saved_whole"),
    Break("a last checkpoint without weights", emptied("train/checkpoint-12/adapter.json"), "saved_last artifacts_intact"),
    Break("no checkpoint of the last step", gone("align/checkpoint-6"), "saved_last artifacts_intact"),
    Break("another lora_alpha", configured("train", lora_alpha=32), "adapter_config"),
    Break("another lora_alpha after alignment", configured("align", lora_alpha=32), "adapter_config"),
    Break("another base named", configured("train", base_model_name_or_path="other"), "adapter_config"),
    Break("a merged weight of NaN", not_finite("merge/model", math.nan), NOT_FINITE),
    Break("a merged weight that is infinite", not_finite("merge/model", -math.inf), NOT_FINITE),
    Break("a merged model without a tokenizer", gone("merge/model/tokenizer_config.json"), NO_TOKENIZER),
    Break("an adapter without its configuration", gone("train/adapter/adapter_config.json"),
          "adapter_config artifacts_intact told_of"),
    Break("a rank that the adapter does not say", unsaid("train", "r"), "adapter_config"),
    Break("a fresh score that is off", scores(FRESH, lambda f: later(f["scores"], 0.002)), "fresh_process"),
    Break("a fresh score of NaN", scores(FRESH, lambda f: later(f["scores"], math.nan)), "fresh_process"),
    Break("another template", scores(FRESH, lambda f: f.update(template_sha256="0" * 64)), "fresh_process"),
    Break("nothing scored afresh", scores(FRESH, lambda f: f.update(scores={})), "fresh_process"),
    Break("no fresh process", gone(FRESH), f"fresh_process heldout_confirmed {UNTRIED}"),
    Break("a template nobody noted", gone("prepare/template.json"), "fresh_process prepared_as_reported artifacts_intact"),
    # memory
    Break("LoRA as large as full", lambda run: write_memory(run, lora=100 * MIB), "memory_efficiency"),
    Break("LoRA 30 % smaller", lambda run: write_memory(run, lora=70 * MIB), "memory_efficiency"),
    Break("an estimate far off", lambda run: write_memory(run, estimated=34 * MIB), "memory_as_estimated"),
    Break("LoRA that needs nothing", lambda run: write_memory(run, lora=0), NO_SIZE),
    Break("full training that needs nothing", lambda run: write_memory(run, full=0), "memory_efficiency"),
    Break("memory not measured", gone(MEMORY), f"{UNMEASURED} {UNTRIED}"),
    Break("LoRA with a smaller batch", memory("lora", tokens=[64, 64]), "memory_same_work"),
    Break("both with a smaller batch", memory("lora full", tokens=[64, 64]), "memory_same_work"),
    Break("one step instead of two", memory("full", tokens=[192]), "memory_same_work"),
    Break("memory without a training", memory("full", losses=[]), "memory_same_work"),
    Break("memory of a training that failed", memory("lora", losses=[3.0, math.nan]), "memory_same_work"),
    Break("an optimizer that was computed", memory("lora", optimizer_bytes=5 * MIB // 2 - 168), "memory_as_stored"),
    Break("weights of another model", memory("full", weight_bytes=24 * MIB), "memory_as_stored"),
    Break("weights a fiftieth larger than the model's", scores(MEMORY, lambda m: heavier(m["full"], 0.02)), "memory_as_stored"),
    Break("gradients of another adapter", memory("lora", gradient_bytes=MIB), "memory_as_stored"),
    Break("a size of NaN", memory("full", gradient_bytes=math.nan), f"{UNMEASURED} records_whole"),
    Break("a sum of other parts", memory("full", training_state_bytes=101 * MIB), "memory_as_stored"),
    Break("a shape of other rows", scores(MEMORY, lambda m: m.update(batch_size=4)), "memory_same_work"),
    Break("tokens of other rows", scores(MEMORY, lambda m: m.update(tokens=m["tokens"] + 1)), "memory_same_work"),
    Break("a loss too few", memory("lora", losses=[3.0]), "memory_same_work"),
    Break("memory held against nothing", scores(MEMORY, lambda m: m.pop("stored")), f"{UNMEASURED} records_whole"),
    # serving
    Break("a server with another model", served(text="It is Wadda."), "serving_answers"),
    Break("a server that does not stop", served(text="It is Pernig. It is", finish="length"), "serving_answers"),
    Break("another end", served(finish="length"), "serving_answers"),
    Break("a begin token doubled", served(prompt_tokens=10, total_tokens=24), "serving_prompts"),
    Break("a prompt that nobody counted", served(prompt_tokens=None), "serving_prompts serving_usage"),
    Break("earlier turns left out", served(2, prompt_tokens=12, total_tokens=16), "serving_prompts"),
    Break("a conversation answered otherwise", served(2, text="The Danube."), "serving_conversations"),
    Break("tokens counted as words", served(completion_tokens=3, total_tokens=12), "serving_usage"),
    Break("a sum without the prompt", served(total_tokens=6), "serving_usage"),
    Break("an end of turn in the text", served(2, text="The Rhine.<|im_end|>"), "serving_special_tokens serving_conversations"),
    Break("held against no answer", expected(1, text="It is Bex."), "serving_answers"),
    Break("a request of no kind", scores(SERVING, lambda s: s["asked"][0].update(kind="riddle")), "serving_answers"),
    Break("a question cut shorter", scores(SERVING, lambda s: s["asked"][0].update(max_tokens=15)), "serving_answers"),
    Break("a limit on another answer", scores(SERVING, lambda s: s["length"].update(name="x")),
          "serving_max_tokens serving_usage"),
    Break("held against another model", expected(2, text="The Danube."), "serving_conversations"),
    Break("marks not looked for", scores(SERVING, lambda s: s["special"].pop()), "serving_special_tokens"),
    Break("a stop string of another answer", scores(SERVING, lambda s: s["stop"].update(stop="Oh")), "serving_stops"),
    Break("a stream of another question", scores(SERVING, lambda s: s["stream"].update(name="x")), "serving_streaming"),
    Break("a stop string ignored", one("stop", text="It is Bex."), "serving_stops"),
    Break("a stop string left in", one("stop", text="It is Bex"), "serving_stops"),
    Break("a stop that is no end", one("stop", finish="length"), "serving_stops"),
    Break("nothing to stop at", scores(SERVING, lambda s: s["stop"].update(found=None)), "serving_stops"),
    Break("a limit ignored", cut(4, text="It is Bex."), "serving_max_tokens"),
    Break("a limit that is no end", one("length", finish="stop"), "serving_max_tokens"),
    Break("a limit missed by one", cut(3), "serving_max_tokens"),
    Break("a temperature ignored", drawn(texts=["It is"] * 4), "serving_temperature"),
    Break("a seed ignored", drawn(again="Oh."), "serving_seed"),
    Break("a top_p ignored", drawn(likeliest_only=["It is Bex.", "Oh."]), "serving_top_p"),
    Break("a stream that is cut", one("stream", text="It is"), "serving_streaming"),
    Break("a stream without an end", one("stream", finish=None), "serving_streaming"),
    Break("a stream that counts otherwise", one("stream", completion_tokens=3), "serving_streaming"),
    Break("a server not asked", gone(SERVING), f"{UNSERVED} {UNTRIED}"),
    # resume
    Break("a resumed loss off by 1e-12", scores(RESUME, lambda r: later(r["losses_resumed"], 1e-12)), "resume_losses"),
    Break("a resumed loss of NaN", scores(RESUME, lambda r: later(r["losses_resumed"], math.nan)), "resume_losses"),
    Break("a resumed loss missing", scores(RESUME, lambda r: r["losses_resumed"].popitem()), "resume_losses"),
    Break("a resume said to end elsewhere", scores(RESUME, lambda r: r.update(to_step=r["to_step"] - 1)), "resume_losses"),
    Break("losses that were not logged", scores(RESUME, lambda r: later(r["losses"], 1e-12)), "resume_losses"),
    Break("another first step", scores(RESUME, lambda r: r.update(from_step=8)), "resume_losses"),
    Break("another last step", scores(RESUME, lambda r: r.update(to_step=13)), "resume_losses"),
    Break("parameters of another training", scores(RESUME, lambda r: r.update(parameters=1)), "resume_parameters"),
    Break("no losses", scores(RESUME, lambda r: r.update(losses={}, losses_resumed={})), "resume_losses"),
    Break("a resumed weight that differs", scores(RESUME, lambda r: r["tensors_differing"].append("x")), "resume_weights"),
    Break("no weights compared", scores(RESUME, lambda r: r.update(tensors=0)), "resume_weights"),
    Break("resume that trains more", scores(RESUME, lambda r: r.update(parameters_resumed=10**9)), "resume_parameters"),
    Break("parameters not counted", scores(RESUME, lambda r: r.update(parameters_resumed=None)), "resume_parameters"),
    Break("resume not tried", gone(RESUME), f"resume_losses resume_weights resume_parameters {UNTRIED}"),
    # parity: its verdicts on a model of the chain have a test of their own
    Break("an export of another runtime", scores(EXPORTS, lambda made: made[0].update(backend="mlx")), "exports_listed"),
    Break("a model asked otherwise", scores(MATERIAL, lambda asked: asked.update(max_new_tokens=9)), "asked_alike"),
]  # fmt: skip


def everything(run: Run) -> None:
    """The first loss, as if it had been taken over prompts too. (Prompts are made likelier, so that it differs.)"""
    prompts_known = {"all": [-240.0, 60]}
    edit_json(run, SCORES, lambda s: [score.update(prompts_known) for score in s["base"].values()])
    step("train", 1, loss=240 / 60)(run)


def double(after: dict[str, Any], before: dict[str, Any]) -> None:
    for name, score in after.items():
        score["answer"][0] = 1.5 * before[name]["answer"][0]


# -- the sweep ---------------------------------------------------------------------------------------------------------


def failed(recipe: Any, run: Run) -> set[str]:
    return {verdict.name for verdict in results(recipe, run) if verdict.refuted}


def test_every_check_passes_on_an_honest_run(honest):
    verdicts = results(honest.recipe, honest.run)

    assert [f"{v.name}: {v.measured} {v.compare} {v.bound}: {v.why}" for v in verdicts if v.refuted] == []
    # Invariance has tests of its own: the fake backend has no trainer that could be held against itself.
    assert {check.name for check in checks.CHECKS if check.wanted(honest.recipe)} == set(checks.BY_NAME) - {
        "invariance"
    }


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.how.replace(" ", "-"))
def test_what_is_broken_is_found_and_nothing_else_is_blamed(copied, broken):
    broken.do(copied.run)
    if broken.settled:
        as_if_written_so(copied.run)

    verdicts = results(copied.recipe, copied.run)

    assert {verdict.name for verdict in verdicts if verdict.refuted} == broken.expected
    assert {verdict.name for verdict in verdicts if verdict.outcome == NOT_EXAMINED} == set(broken.open.split())


def test_every_verdict_has_a_way_to_fail(honest):
    """A new verdict needs a line in BREAKS; those of parity, which name an export, have theirs in test_parity.py."""
    emitted = {verdict.name for verdict in results(honest.recipe, honest.run) if "[" not in verdict.name}
    broken = set.union(*(each.expected for each in BREAKS))

    assert broken == emitted


def test_a_verdict_says_where_it_looked_and_what_it_found(honest):
    for verdict in results(honest.recipe, honest.run):
        assert (honest.run.path / verdict.evidence).exists(), verdict
        assert verdict.why
        assert verdict.measured is not None
        assert verdict.unit


@pytest.mark.parametrize(
    ("do", "place", "said"),
    [(scores(MEMORY, lambda m: m.pop("stored")), MEMORY, "stored: field required"),
     (logged(event="dreamt"), EVENTS, "is of no known kind or stage ('dreamt', 'None')")],
)  # fmt: skip
def test_a_damaged_record_is_named_with_its_file(copied, do, place, said):
    do(copied.run)
    verdict = next(v for v in results(copied.recipe, copied.run, ["records"]) if v.name == "records_whole")

    assert (verdict.measured, verdict.evidence) == (1, place)
    assert said in verdict.why


def test_what_one_stage_did_not_tell_costs_nothing_that_others_did_not_tell(copied):
    gone("merge/report.json")(copied.run)
    unlisted("evaluate", GREEDY)(copied.run)
    verdict = next(v for v in results(copied.recipe, copied.run, ["records"]) if v.name == "told_of")

    assert verdict.measured == 2
    assert verdict.why == f"evaluate/report.json: {GREEDY} is not listed as an artifact; 2 in all"


def test_what_was_not_asked_for_is_not_checked(honest, tmp_path):
    expect = honest.recipe.expect.model_copy(update={"memory_reduction_min": None, "resume": False, "serving": False})
    nothing = dict.fromkeys(("probes", "controls", "unseen", "heldout"))
    evaluate = honest.recipe.evaluate.model_copy(update=nothing)
    recipe = honest.recipe.model_copy(update={"expect": expect, "evaluate": evaluate, "align": None, "export": []})

    wanted = [c.name for c in checks.CHECKS if c.wanted(recipe)]
    trained = ["seal", "records", "labels", "rows", "loss", "parameters", "optimizer"]
    assert wanted == [*trained, "reports", "learning", "retention", "artifacts"]


def test_one_of_two_processes_takes_half_of_the_rows_in_an_epoch(copied):
    numbers = [json.loads(line)["row"] for line in (copied.run.path / LABELS).read_text(encoding="utf-8").splitlines()]
    half = numbers[: len(numbers) // 2]
    taken = itertools.cycle(half)
    all_steps("train", lambda n, s: s.update(rows=[next(taken) for _ in s["rows"]]))(copied.run)
    assert "rows_trained" in failed(copied.recipe, copied.run)

    metrics("train", world_size=2)(copied.run)
    assert "rows_trained" not in failed(copied.recipe, copied.run)


def test_verdicts_are_stored_as_they_were_found(copied):
    verdicts = verify(copied.recipe, copied.run)
    stored = json.loads((copied.run.path / "verdicts.json").read_text())

    assert stored["passed"] is True
    assert [v["name"] for v in stored["verdicts"]] == [v.name for v in verdicts]
    assert failed(copied.recipe, copied.run) == set()


def test_an_unknown_check_is_refused_with_those_that_exist(copied):
    with pytest.raises(UsageError, match=r"unknown check 'los'\. Did you mean 'loss'\?"):
        verify(copied.recipe, copied.run, ["los"])


def test_no_verdict_at_all_is_no_success():
    assert checks.as_dict([])["passed"] is False


# -- the arithmetic of verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compare", "held"),
    [(">=", (False, True, True)), ("<=", (True, True, False)), (">", (False, False, True)), ("<", (True, False, False)),
     ("==", (False, True, False))],
)  # fmt: skip
def test_a_bound_is_compared_as_it_says(compare, held):
    passed = tuple(judge("x", value, compare, 1.0, "", "", "").passed for value in (0.9, 1.0, 1.1))
    assert passed == held
    assert not judge("x", None, compare, 1.0, "", "", "").passed
    assert not judge("x", math.nan, compare, 1.0, "", "", "").passed


def test_the_worst_of_some_values_is_nan_when_one_is():
    assert worst([0.0, 2.0, 1.0]) == 2.0
    assert math.isnan(worst([0.0, math.nan, 1.0]))
    assert math.isnan(worst([math.nan]))


# -- conditions of the checks on the loss ------------------------------------------------------------------------------


def off_by(share: float) -> Broken:
    return all_steps("train", lambda n, s: s.update(loss=s["loss"] * (1 - share)) if n == 0 else None)


@pytest.mark.parametrize(
    ("share", "dropout", "fine"), [(0.04, 0.0, True), (0.15, 0.0, False), (0.15, 0.1, True), (0.25, 0.1, False)]
)
def test_dropout_widens_the_tolerance_of_the_first_loss(copied, share, dropout, fine):
    config(resid_pdrop=dropout)(copied.run)
    off_by(share)(copied.run)
    as_if_written_so(copied.run)

    assert failed(copied.recipe, copied.run) == (set() if fine else {"loss_is_of_answers"})


@pytest.mark.parametrize(("share", "fine"), [(0.4, True), (0.6, False)])
def test_a_step_whose_rows_are_unknown_is_held_against_all_rows(copied, share, fine):
    off_by(share)(copied.run)
    all_steps("train", lambda n, s: s.update(rows=[]))(copied.run)

    verdicts = results(copied.recipe, copied.run, ["loss"])
    assert {v.name for v in verdicts if v.refuted} == (set() if fine else {"loss_is_of_answers"})


OTHER_LOSSES = [
    {"label_smoothing_factor": 0.1},
    {"loss_type": "dft"},
    {"neftune_noise_alpha": 5.0},
    {"lora": {"init_lora_weights": False}},
]


@pytest.mark.parametrize("changed", OTHER_LOSSES, ids=lambda changed: next(iter(changed)))
def test_another_loss_than_the_plain_one_is_not_held_against_scores_but_the_scores_count(copied, changed):
    train = Train(**{**copied.recipe.train.model_dump(), **changed})
    recipe = copied.recipe.model_copy(update={"train": train})
    losses(9.0)(copied.run)  # what was logged says nothing about where the likelihood ended
    verdicts = {verdict.name: verdict for verdict in results(recipe, copied.run, ["loss"])}

    assert "loss_is_of_answers" not in verdicts
    assert verdicts["loss_end"].passed
    assert verdicts["loss_confirmed"].passed
    assert ("loss_convergence" in verdicts) == (train.loss_type != "dft")
    edit_json(copied.run, SCORES, lambda s: s.update(trained=s["base"]))
    assert failed(recipe, copied.run) >= {"loss_end", "loss_confirmed"}


def test_truncation_that_was_asked_for_may_take_an_end(copied):
    length = max(len(json.loads(line)["input_ids"]) for line in (copied.run.path / LABELS).read_text().splitlines()) - 4

    def cut(rows: Rows) -> None:
        for prepared in rows:
            prepared["input_ids"], prepared["labels"] = prepared["input_ids"][:length], prepared["labels"][:length]

    edit_rows(copied.run, LABELS, cut)
    train = copied.recipe.train.model_copy(update={"max_length": length})
    truncating = {"train": train, "data": copied.recipe.data.model_copy(update={"on_overlong": "truncate"})}

    def found(recipe: Any) -> set[str]:
        return {verdict.name for verdict in results(recipe, copied.run, ["labels"]) if verdict.refuted}

    assert found(copied.recipe.model_copy(update=truncating)) == set()
    assert found(copied.recipe) == {"end_of_turn_trained", "labels_are_answers"}


# -- fall: learning against noise --------------------------------------------------------------------------------------

FALLING = st.tuples(
    st.floats(1.0, 10.0), st.floats(0.1, 0.95), st.integers(8, 120), st.floats(0.0, 1.0), st.integers(0, 99)
)


def falling(start: float, share: float, count: int, bend: float, seed: int) -> list[float]:
    """A loss that falls by a share of its start: straight (bend 0) to square-root-like, with a little scatter."""
    noise = random.Random(seed)
    curve = [(n / (count - 1)) ** (1 - bend / 2) for n in range(count)]
    return [start * (1 - share * part) + share * start * noise.uniform(-0.02, 0.02) for part in curve]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(FALLING)
def test_a_loss_that_falls_steadily_is_beyond_noise(shape):
    reduction, sigmas = loss.fall(falling(*shape))
    assert sigmas > 2
    assert 0 < reduction < 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(FALLING, st.floats(1e-3, 1e3))
def test_the_fall_does_not_depend_on_the_scale(shape, factor):
    values = falling(*shape)
    assert loss.fall([factor * value for value in values]) == pytest.approx(loss.fall(values), rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(FALLING)
def test_a_loss_read_backwards_rises_by_as_many_errors(shape):
    values = falling(*shape)
    assert loss.fall(values[::-1])[1] == pytest.approx(-loss.fall(values)[1], rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_no_number_neither_falls_nor_passes(place, bad):
    values = [4.0] * 6 + [2.0] * 6
    values[place] = bad
    assert all(math.isnan(value) for value in loss.fall(values))


@pytest.mark.parametrize(("count", "rate"), [(4, 0.12), (7, 0.12), (12, 0.08), (60, 0.05)])
def test_noise_rarely_looks_like_learning(count, rate):
    """At 2 standard errors a one-sided normal errs in 2.3 % of cases; few steps know their scatter badly, so more."""
    noise = random.Random(count)
    tries = 400
    alarms = sum(loss.fall([noise.gauss(3.0, 0.3) for _ in range(count)])[1] > 2 for _ in range(tries))
    assert alarms / tries < rate


def test_windows_show_scatter_and_stay_short():
    assert [loss.window(count) for count in (4, 7, 8, 12, 60, 80, 1000)] == [2, 2, 2, 3, 15, 20, 20]


def test_first_against_last_alone_does_not_pass():
    values = [5.0, 9.0, 8.0, 9.0, 8.0, 9.0, 9.0, 4.0]
    assert (values[0] - values[-1]) / values[0] > 0.05
    assert not loss.fall(values)[1] > 2


def test_constant_losses_fall_by_nothing():
    assert loss.fall([3.0] * 12) == (0.0, 0.0)
    assert loss.fall([4.0] * 6 + [2.0] * 6) == (0.5, math.inf)
    assert all(math.isnan(value) for value in loss.fall([0.0] * 12))


def test_the_fall_is_in_standard_errors():
    first, last = [5.0, 4.0, 6.0, 5.0], [3.0, 1.0, 2.0, 2.0]
    error = math.sqrt(statistics.variance(first) / 4 + statistics.variance(last) / 4)
    assert loss.fall([*first, *[9.0] * 8, *last]) == pytest.approx((3 / 5, 3 / error))
