"""Was every row of the data prepared, and did the training take every one, with the tokens that it has?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.backends import tokenizer_of
from finetune.checks import Verdict, judge
from finetune.checks.parts import SFT, single, trains
from finetune.core.errors import FinetuneError, StageError, first_line
from finetune.data import encode, formats, sources, templates
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.recipe.sections import Data
from finetune.run import Run, evidence, layout
from finetune.run.records.trained import Pair, Row, Step

ROWS = layout.TRAIN_ROWS.path
EVENTS = layout.EVENTS.path
PACKED_TOLERANCE = 0.05  # packing hides which rows a step held; whole epochs come out at 0, a part of one does not

WHOLE = 0.999  # of what was asked: an epoch is logged as a fraction, which rounds


# -- what other checks share -------------------------------------------------------------------------------------------


def examples_again(data: Data | None) -> list[formats.Example]:
    """The examples of the data, read again. Raises StageError where that cannot be."""
    if data is None:
        raise StageError("the recipe names no data")
    try:
        return formats.to_examples(sources.read(data), data)
    except FinetuneError as error:
        raise StageError(f"the data cannot be read again: {first_line(error)}") from None


def rendering(recipe: Recipe, run: Run) -> tuple[Tokenizer, templates.ChatTemplate]:
    """The tokenizer of the base and the chat template that the run was prepared with."""
    tokenizer = tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))
    return tokenizer, templates.ChatTemplate(name="run", source=evidence.chat_template(run))


def labelled(row: Row) -> int:
    """How many tokens of a row carry a label."""
    return sum(label != encode.IGNORED for label in row["labels"])


def first_pass(name: str, run: Run, stage: str, rows: Sequence[Row] | Sequence[Pair], steps: Sequence[Step]) -> Verdict:
    """An epoch takes every row once: the first pass over the data has none twice."""
    processes = max(1, evidence.read(run, layout.TRAININGS[stage])["metrics"]["world_size"])
    taken = [row for step in steps for row in step["rows"]][: len(rows) // processes]
    known = set(taken) & {row["row"] for row in rows}
    why = f"the first {len(taken)} rows that the stage {stage} took were {len(known)} of the {len(rows)} prepared ones"
    share = len(known) / len(taken) if taken else None
    return judge(name, share, "==", 1.0, "share", EVENTS, why)


def tokens_of_steps(name: str, lengths: Mapping[int, int], steps: Sequence[Step]) -> Verdict:
    """The tokens that each step's batch trained, against those of the same rows as prepared (`lengths` by row)."""
    wrong = [step for step in steps if step["trained_tokens"] != sum(lengths.get(row, 0) for row in step["rows"])]
    why = f"{len(steps) - len(wrong)} of {len(steps)} steps trained the tokens of their rows' answers, and no others"
    if wrong:
        expected = sum(lengths.get(row, 0) for row in wrong[0]["rows"])
        why += f"; step {wrong[0]['step']} trained {wrong[0]['trained_tokens']} instead of {expected}"
    share = 1 - len(wrong) / len(steps) if steps else None
    return judge(name, share, "==", 1.0, "share of steps", EVENTS, why)


# -- the verdicts ------------------------------------------------------------------------------------------------------


def _prepared(recipe: Recipe, run: Run) -> Verdict:
    """Rows of the data that are neither prepared, nor held out, nor left out as the recipe says; and rows given twice."""
    examples = examples_again(recipe.data)
    assert recipe.data is not None
    rows = evidence.rows(run, layout.TRAIN_ROWS)
    counted = Counter(row["row"] for row in rows)
    if not recipe.data.eval_path:
        counted.update(row["row"] for row in evidence.maybe_rows(run, layout.EVAL_ROWS))
    absent = [number for number in range(len(examples)) if number not in counted]
    lost = [number for number in absent if not _left_out(examples, number, counted, recipe, run)]
    twice = [number for number, times in counted.items() if times > 1 or number >= len(examples)]
    moved = [
        row["row"]
        for row in rows
        if row["row"] < len(examples)
        and (row["file"], row["line"]) != (str(examples[row["row"]].file), examples[row["row"]].line)
    ]
    why = f"of {len(examples)} rows of the data {len(counted)} are prepared"
    if len(absent) > len(lost):
        why += f", {len(absent) - len(lost)} left out as the recipe says"
    for said, numbers in (("lost", lost), ("twice, or of no row", twice), ("said to be of another line", moved)):
        if numbers and numbers[0] < len(examples):
            first = examples[numbers[0]]
            why += f"; {said}: {len(numbers)}, first {first.file}:{first.line}"
        elif numbers:
            why += f"; {said}: {len(numbers)}"
    return judge("rows_prepared", len(lost) + len(twice) + len(moved), "==", 0, "rows lost or repeated", ROWS, why)


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


def _trained(recipe: Recipe, run: Run) -> Verdict:
    return first_pass("rows_trained", run, "train", evidence.rows(run, layout.TRAIN_ROWS), SFT.steps(run))


def _tokens(recipe: Recipe, run: Run) -> Verdict:
    rows, steps = evidence.rows(run, layout.TRAIN_ROWS), SFT.steps(run)
    if _packs(recipe):
        return _packed_tokens(rows, steps)
    return tokens_of_steps("tokens_as_prepared", {row["row"]: labelled(row) for row in rows}, steps)


def _packs(recipe: Recipe) -> bool:
    """Whether steps do not know their rows."""
    return recipe.train is not None and recipe.train.packing


def _packed_tokens(rows: list[Row], steps: list[Step]) -> Verdict:
    """Where steps do not know their rows: the tokens trained in an epoch, against those of all rows."""
    whole = sum(map(labelled, rows))
    epochs = steps[-1]["epoch"]
    trained = sum(step["trained_tokens"] for step in steps) / epochs if epochs else 0.0
    why = f"{trained:.0f} tokens trained in an epoch; the prepared rows have {whole} labels"
    distance = abs(trained - whole) / whole if whole else None
    return judge("tokens_as_prepared", distance, "<=", PACKED_TOLERANCE, "relative distance", EVENTS, why)


def _whole(recipe: Recipe, run: Run) -> Verdict:
    """Whether training went on as long as the recipe says."""
    train = recipe.train
    assert train is not None
    facts, rows = SFT.facts(run), evidence.rows(run, layout.TRAIN_ROWS)
    taken = facts["steps"]
    epochs = _epochs(len(rows), SFT.steps(run), taken, max(1, facts["world_size"]))
    if train.max_steps > 0:
        share, wanted = taken / train.max_steps, f"{train.max_steps} steps"
    else:
        share = epochs / train.num_train_epochs
        wanted = f"{train.num_train_epochs:g} epochs"
    why = f"{taken} steps, {epochs:.2f} epochs; the recipe asks for {wanted}"
    return judge("trained_to_the_end", share, ">=", WHOLE, "share", EVENTS, why)


def _epochs(rows: int, steps: Sequence[Step], taken: int, processes: int) -> float:
    """How often the prepared rows were taken: counted; with packing, and after the last logged step, as the log has it."""
    last = steps[-1]
    counted = sum(len(step["rows"]) for step in steps) * processes / rows
    a_step = last["epoch"] / last["step"]
    return counted + (taken - last["step"]) * a_step if counted else taken * a_step


def _to_the_end(recipe: Recipe) -> bool:
    """Whether training may not stop early."""
    return recipe.train is not None and recipe.train.early_stopping_patience is None


PARTS = (
    single("rows_prepared", _prepared, ROWS),
    single("rows_trained", _trained, EVENTS, lambda recipe: trains(recipe) and not _packs(recipe)),
    single("tokens_as_prepared", _tokens, EVENTS),
    single("trained_to_the_end", _whole, EVENTS, _to_the_end),
)
