"""The schema number of every kind of file that finetune writes and reads back, and how an older one is read.

A number is raised when a key changes its meaning, goes, or must be there; a key that may be there raises none. A file says
its own under `schema`; one that says none is of version 0.1, which is 0. Files are never written again in a newer form:
an older one is changed in memory, as it is read, and keeps its number there, since that tells what it could not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import NewerError

KEY = "schema"
Step = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One kind of file. `number` is today's. `steps` lead there from the oldest that is read, each from a number to the next:
    pure functions on plain data. `since` names keys that are in every file from a number on, and in none before."""

    what: str
    file: str
    number: int
    steps: tuple[Step, ...] = ()
    since: Mapping[str, int] = field(default_factory=dict)

    @property
    def oldest(self) -> int:
        """The smallest number that is read."""
        return self.number - len(self.steps)

    def number_of(self, stored: Mapping[str, Any], place: str | Path) -> int:
        """The number of a file. Raises NewerError naming `place` for one beyond today's, ValueError for what is none that is
        read, and for a file that is not whole as one of its number."""
        found = stored.get(KEY, 0)
        if isinstance(found, bool) or not isinstance(found, int) or found < self.oldest:
            known = f"{self.oldest} to {self.number}" if self.steps else f"{self.number}"
            raise ValueError(f"its schema is {found!r}, and this version knows {known}")
        if found > self.number:
            raise NewerError(
                f"{place} was written by a later version of finetune: its schema is {found}, and this version knows up to "
                f"{self.number}. Upgrade finetune"
            )
        for key, first in self.since.items():
            if (key in stored) != (found >= first):
                raise ValueError(f"its schema is {found}, and '{key}' is {'there' if key in stored else 'not'}")
        return found

    def read(self, stored: Mapping[str, Any], place: str | Path) -> dict[str, Any]:
        """What a file says, in today's form, but for its number. Raises as `number_of`."""
        value = dict(stored)
        for step in self.steps[self.number_of(stored, place) - self.oldest :]:
            value = step(value)
        return {**value, KEY: stored[KEY]} if KEY in stored else value

    def written(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """What is written of a value in today's form: its number first."""
        return {KEY: self.number, **{key: said for key, said in value.items() if key != KEY}}


def fewer_keys(stored: dict[str, Any]) -> dict[str, Any]:
    """From 0 to 1 where version 0.1 wrote the same keys and fewer: what it did not tell is not made up."""
    return stored


def with_outcomes(stored: dict[str, Any]) -> dict[str, Any]:
    """Verdicts from 0 to 1: version 0.1 had two outcomes, which `passed` tells, and neither remedies nor causes."""
    words = {True: "proved", None: "not examined"}
    verdicts = [
        {"remedy": "", "outcome": words.get(each.get("passed"), "refuted"), **each} for each in stored["verdicts"]
    ]
    return {**stored, "verdicts": verdicts}


RECIPE = Schema(what="recipe", file="recipe.yaml", number=1, steps=(fewer_keys,))
MANIFEST = Schema(what="a run's manifest", file="manifest.json", number=1, steps=(fewer_keys,))
EVENT = Schema(what="a line of a run's log", file="events.jsonl", number=1, steps=(fewer_keys,))
REPORT = Schema(
    what="a stage's report",
    file="STAGE/report.json",
    number=1,
    steps=(fewer_keys,),
    since={"asked": 1, "files": 1, "made_with": 1},
)
VERDICTS = Schema(what="verdicts", file="verdicts.json", number=1, steps=(with_outcomes,))
CHECKPOINT = Schema(what="the digests of a checkpoint's files", file="STAGE/checkpoint-N/digests.json", number=1)
TRAINING = Schema(what="which training a checkpoint is of", file="STAGE/checkpoint-N/finetune.json", number=1)
BUNDLE = Schema(what="a bundle's manifest", file="export/bundle/manifest.json", number=1, steps=(fewer_keys,))
# Nothing reads it back; its form is docs/report.schema.json.
SUMMARY = Schema(what="the report of a run, for other programs", file="report.json", number=2)

KINDS = (RECIPE, MANIFEST, EVENT, REPORT, VERDICTS, CHECKPOINT, TRAINING, BUNDLE, SUMMARY)
