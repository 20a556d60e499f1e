"""Was every row of the data prepared, and did the training take every one, with the tokens that it has?"""

from __future__ import annotations

from collections import Counter
from typing import Any

from finetune import evidence
from finetune.backends import Tokenizer, get
from finetune.checks import Verdict, judge, missing
from finetune.data import encode, formats, sources, templates
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.run import Run

ROWS = "prepare/train.jsonl"
HELD_OUT = "prepare/eval.jsonl"
EVENTS = "events.jsonl"
PACKED_TOLERANCE = 0.05  # packing hides which rows a step held; whole epochs come out at 0, a part of one does not

WHOLE = 0.999  # of what was asked: an epoch is logged as a fraction, which rounds


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    if not (run.path / ROWS).is_file():
        return [missing("rows_prepared", "==", 0, "rows", ROWS, "the prepared rows are not there")]
    rows = evidence.read_rows(run, ROWS, "prepare")
    steps = evidence.steps(run, "train")
    if not rows or not steps:
        why = "there is no prepared row" if not rows else "training logged no step"
        return [missing("rows_trained", "==", 1.0, "share", EVENTS, why)]
    verdicts = [_prepared(recipe, run, rows)]
    if any(step["rows"] for step in steps):
        lengths = {row["row"]: _labelled(row) for row in rows}
        verdicts.append(first_pass("rows_trained", run, "train", rows, steps))
        verdicts.append(tokens_of_steps("tokens_as_prepared", lengths, steps))
    else:
        verdicts.append(_packed_tokens(rows, steps))
    return [*verdicts, *_whole(recipe, run, len(rows), steps)]


def _prepared(recipe: Recipe, run: Run, rows: list[dict[str, Any]]) -> Verdict:
    """Rows of the data that are neither prepared, nor held out, nor left out as the recipe says; and rows given twice."""
    name, unit = "rows_prepared", "rows lost or repeated"
    data = recipe.data
    if data is None:
        return missing(name, "==", 0, unit, ROWS, "the recipe names no data")
    try:
        examples = formats.to_examples(sources.read(data), data)
        counted = Counter(row["row"] for row in rows)
        if not data.eval_path and (run.path / HELD_OUT).is_file():
            counted.update(row["row"] for row in evidence.read_rows(run, HELD_OUT, "prepare"))
        absent = [number for number in range(len(examples)) if number not in counted]
        lost = [number for number in absent if not _left_out(examples, number, counted, recipe, run)]
    except FinetuneError as error:
        return missing(name, "==", 0, unit, ROWS, f"the data cannot be read again: {first_line(error)}")
    twice = [number for number, times in counted.items() if times > 1 or number >= len(examples)]
    why = f"of {len(examples)} rows of the data {len(counted)} are prepared"
    if len(absent) > len(lost):
        why += f", {len(absent) - len(lost)} left out as the recipe says"
    for said, numbers in (("lost", lost), ("twice, or of no row", twice)):
        if numbers and numbers[0] < len(examples):
            first = examples[numbers[0]]
            why += f"; {said}: {len(numbers)}, first {first.file}:{first.line}"
        elif numbers:
            why += f"; {said}: {len(numbers)}"
    return judge(name, len(lost) + len(twice), "==", 0, unit, ROWS, why)


def _left_out(examples: list[formats.Example], number: int, counted: Counter[int], recipe: Recipe, run: Run) -> bool:
    """Whether the recipe has this row dropped: it repeats one that is there, or is too long."""
    data, train, example = recipe.data, recipe.train, examples[number]
    assert data is not None and train is not None
    if data.on_duplicate == "drop":
        same = (
            other
            for other, there in enumerate(examples)
            if (there.messages, there.text) == (example.messages, example.text)
        )
        if any(other in counted for other in same):
            return True
    if data.on_overlong != "drop":
        return False
    tokenizer, template = rendering(recipe, run)
    whole = encode.encode_sft(
        example, number, tokenizer=tokenizer, template=template, system=recipe.template.system,
        completion_only=train.completion_only_loss,
    )  # fmt: skip
    return len(whole.input_ids) > train.max_length


def rendering(recipe: Recipe, run: Run) -> tuple[Tokenizer, templates.ChatTemplate]:
    """The tokenizer of the base and the chat template that the run was prepared with."""
    tokenizer = get(recipe.backend).tokenizer(evidence.phases(run, recipe)["base"][0])
    source = evidence.required(run, "prepare/chat_template.jinja", "prepare").read_text(encoding="utf-8")
    return tokenizer, templates.ChatTemplate(name="run", source=source)


def first_pass(name: str, run: Run, stage: str, rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Verdict:
    """An epoch takes every row once: the first pass over the data has none twice."""
    report = run.report(stage)
    processes = (report.metrics.get("world_size") or 1) if report else 1
    taken = [row for step in steps for row in step["rows"]][: len(rows) // processes]
    known = set(taken) & {row["row"] for row in rows}
    why = f"the first {len(taken)} rows that the stage {stage} took were {len(known)} of the {len(rows)} prepared ones"
    share = len(known) / len(taken) if taken else None
    return judge(name, share, "==", 1.0, "share", EVENTS, why)


def tokens_of_steps(name: str, lengths: dict[int, int], steps: list[dict[str, Any]]) -> Verdict:
    """The tokens that each step's batch trained, against those of the same rows as prepared (`lengths` by row)."""
    wrong = [step for step in steps if step["trained_tokens"] != sum(lengths.get(row, 0) for row in step["rows"])]
    why = f"{len(steps) - len(wrong)} of {len(steps)} steps trained the tokens of their rows' answers, and no others"
    if wrong:
        expected = sum(lengths.get(row, 0) for row in wrong[0]["rows"])
        why += f"; step {wrong[0]['step']} trained {wrong[0]['trained_tokens']} instead of {expected}"
    share = 1 - len(wrong) / len(steps) if steps else None
    return judge(name, share, "==", 1.0, "share of steps", EVENTS, why)


def _packed_tokens(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Verdict:
    """Where steps do not know their rows: the tokens trained in an epoch, against those of all rows."""
    whole = sum(map(_labelled, rows))
    epochs = steps[-1]["epoch"]
    trained = sum(step["trained_tokens"] for step in steps) / epochs if epochs else 0.0
    why = f"{trained:.0f} tokens trained in an epoch; the prepared rows have {whole} labels"
    bound = PACKED_TOLERANCE
    return judge("tokens_as_prepared", abs(trained - whole) / whole, "<=", bound, "relative distance", EVENTS, why)


def _whole(recipe: Recipe, run: Run, rows: int, steps: list[dict[str, Any]]) -> list[Verdict]:
    """Whether training went on as long as the recipe says; nothing to say where it may stop early."""
    report, train = run.report("train"), recipe.train
    if report is None or train is None or train.early_stopping_patience is not None:
        return []
    taken = report.metrics["steps"]
    epochs = _epochs(rows, steps, taken, report.metrics.get("world_size") or 1)
    if train.max_steps > 0:
        share, wanted = taken / train.max_steps, f"{train.max_steps} steps"
    else:
        share = epochs / train.num_train_epochs
        wanted = f"{train.num_train_epochs:g} epochs"
    why = f"{taken} steps, {epochs:.2f} epochs; the recipe asks for {wanted}"
    return [judge("trained_to_the_end", share, ">=", WHOLE, "share", EVENTS, why)]


def _epochs(rows: int, steps: list[dict[str, Any]], taken: int, processes: int) -> float:
    """How often the prepared rows were taken: counted; with packing, and after the last logged step, as the log has it."""
    last = steps[-1]
    counted: float = sum(len(step["rows"]) for step in steps) * processes / rows
    a_step: float = last["epoch"] / last["step"]
    return counted + (taken - last["step"]) * a_step if counted else taken * a_step


def _labelled(row: dict[str, Any]) -> int:
    return sum(label != encode.IGNORED for label in row["labels"])
