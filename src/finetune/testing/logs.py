"""What a trainer logged, step by step, whichever wrote it: JSON as finetune and transformers write it, or CSV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.core.parsing import loads
from finetune.data.faults import raise_all
from finetune.data.sources import read_jsonl_objects, resolve

# The columns of a CSV that say so: transformers' and TRL's names, then those of trackers, Lightning and Keras. The first that
# a file has is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "train/global_step", "Step"),
    "loss": ("loss", "train/loss", "train_loss_step", "train_loss", "training_loss"),
    "learning_rate": ("learning_rate", "train/learning_rate", "lr", "lr-AdamW"),
    "grad_norm": ("grad_norm", "train/grad_norm"),
    "epoch": ("epoch", "train/epoch"),
    "eval_loss": ("eval_loss", "eval/loss", "val_loss", "val/loss"),
}
HISTORY = "log_history"
NO_LOG = "cannot be read as a trainer's log"
Names = dict[str, str]  # ours, and the file's
Entries = list[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Logged:
    """One step. Losses in nats; None is what was not logged with it. `step` is the row's number where a trainer logs none, as
    Keras, whose rows are epochs."""

    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    epoch: float | None = None
    eval_loss: float | None = None


def logged_steps(path: str | os.PathLike[str]) -> list[Logged]:
    """The steps in a trainer's log that have a loss, in the file's order; NaN and infinity are losses.

    `path` is finetune's `trainer_logs.json`, transformers' `trainer_state.json` (its `log_history`, or that alone), or a CSV
    with a line of names. Raises MissingError without a file, DataError with every fault, by file, line (in JSON, entry) and
    column.
    """
    file = resolve(os.fspath(path))
    names, entries = _table(file) if file.suffix.lower() == ".csv" else _history(file)
    faults: list[str] = []
    steps: list[Logged] = []
    for number, (place, entry) in enumerate(entries, 1):
        steps += _step(number, place, names, entry, faults)
    raise_all(f"{file} {NO_LOG}:", faults)
    return steps


def _table(file: Path) -> tuple[Names, Entries]:
    """The columns taken, and (place, values) of every row of a CSV; an empty cell is none."""
    rows = read_jsonl_objects(str(file))
    there = rows[0].values
    names = {name: next((each for each in columns if each in there), "") for name, columns in COLUMNS.items()}
    if not names["loss"]:
        wanted = ", ".join(COLUMNS["loss"])
        raise DataError(
            f"{file} {NO_LOG}:", [f"{file}:1: no column is a loss ({wanted}); there are {', '.join(there)}"]
        )
    taken = {name: column for name, column in names.items() if column}
    step = taken.get("step")  # one that is empty in a row with a loss is a fault
    return taken, [
        (f"{file}:{row.line}", {key: cell for key, cell in row.values.items() if cell.strip() or key == step})
        for row in rows
    ]


def _history(file: Path) -> tuple[Names, Entries]:
    """As `_table`, of a JSON list. What transformers says of a whole training there (`train_loss`) is no step."""
    try:
        value = loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} {NO_LOG}:", [f"{file}: not JSON: {error}"]) from None
    found = value.get(HISTORY) if isinstance(value, dict) else value
    if not isinstance(found, list):
        why = f"neither a list of what was logged nor an object with one as '{HISTORY}'"
        raise DataError(f"{file} {NO_LOG}:", [f"{file}: {why}"])
    return {name: name for name in COLUMNS}, [(f"{file}: entry {number}", each) for number, each in enumerate(found, 1)]


def _step(number: int, place: str, names: Names, entry: Any, faults: list[str]) -> Iterator[Logged]:
    """The step in an entry, if it is one and is sound."""
    if not isinstance(entry, dict):
        faults.append(f"{place}: expected names and values, not {entry!r:.80}")
        return
    if entry.get(names["loss"]) is None:  # an evaluation, or the end
        return
    values: dict[str, Any] = {"step": number}
    for name, column in names.items():
        if (said := entry.get(column)) is not None:
            try:
                values[name] = _number(said, whole=name == "step")
            except (TypeError, ValueError):
                faults.append(
                    f"{place}: {column}: expected a {'whole ' if name == 'step' else ''}number, not {said!r:.80}"
                )
                return
    yield Logged(**values)


def _number(value: Any, *, whole: bool) -> float:
    """A number as written; raises ValueError (or TypeError) for what is none, and for a step that is not whole."""
    if isinstance(value, bool):
        raise TypeError
    found = float(value)
    if not whole:
        return found
    if not found.is_integer() or found < 0:
        raise ValueError
    return int(found)
