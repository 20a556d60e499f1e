"""What the fake backend trains on: its rows as places to predict, and the sums of a step's gradient."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.backends.fake.model import Key, Place, places
from finetune.core.errors import StageError
from finetune.core.files import read_jsonl


@dataclass(frozen=True)
class Row:
    """A data row as places to predict: the answer's (SFT), or the chosen and the rejected answer's (DPO)."""

    number: int
    tokens: int
    chosen: list[Place]
    rejected: list[Place] = field(default_factory=list)

    @classmethod
    def of(cls, value: dict[str, Any], index: int) -> Row:
        number = int(value.get("row", index))
        if "prompt_ids" in value:
            prompt, chosen, rejected = value["prompt_ids"], value["chosen_ids"], value["rejected_ids"]
            tokens = 2 * len(prompt) + len(chosen) + len(rejected)
            return cls(number, tokens, _answer(prompt, chosen), _answer(prompt, rejected))
        ids, labels = value["input_ids"], value["labels"]
        # A causal model predicts from the token before, so the first token is never trained.
        return cls(number, len(ids), places(ids, [at for at, label in enumerate(labels) if at and label != -100]))


@dataclass
class Gradient:
    """Sums over a step: per (context, token) and per bigram, with how often each context occurred."""

    rows: dict[tuple[Key, int], float] = field(default_factory=lambda: defaultdict(float))
    bigram: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    seen: dict[Key, int] = field(default_factory=lambda: defaultdict(int))

    def scale(self, factor: float) -> None:
        for part in (self.rows, self.bigram):
            for key in part:
                part[key] *= factor  # type: ignore[index]


def read_rows(file: Path) -> list[Row]:
    rows = [Row.of(value, index) for index, value in enumerate(read_jsonl(file))]
    if not rows:
        raise StageError(f"{file} has no rows to train on")
    return rows


def _answer(prompt: list[int], answer: list[int]) -> list[Place]:
    return places([*prompt, *answer], range(len(prompt), len(prompt) + len(answer)))
