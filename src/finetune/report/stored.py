"""What a run has on disk, as reports show it. A file that cannot be read is named once and shown as not there, so that a
damaged run is reported too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from finetune.core.errors import FinetuneError, StageError, first_line
from finetune.evaluation.answers import is_correct
from finetune.recipe import load
from finetune.recipe.yaml import parse
from finetune.report import wording
from finetune.run import Report, Run, evidence, layout, seal
from finetune.run.outcome import holds, marks, outcome
from finetune.run.plan import STAGES, TRAININGS

PHASES = tuple(wording.PHASES)
EDITED = "was changed after it was written: verify again"
T = TypeVar("T")


def verdicts(run: Run) -> dict[str, Any] | None:
    """The stored verdicts, each with its `outcome` and `remedy`, whatever version stored them; None where nothing was
    verified. Raises StageError where they are damaged, or were changed after they were written."""
    found = evidence.maybe(run, layout.VERDICTS)
    if found is None:
        return None
    told = layout.VERDICTS.path in seal.recorded(run.log())
    if not seal.is_as_recorded(run, layout.VERDICTS.path) or (not told and seal.is_sealed(run)):
        raise StageError(f"{run.path / layout.VERDICTS.path} {EDITED} with: finetune verify {run.path}")
    listed = [{**each, "outcome": outcome(each)} for each in found["verdicts"]]
    return {"cause": "", **found, "verdicts": listed, "passed": holds(map(outcome, listed))}


def reports(run: Run) -> list[Report]:
    """The reports of the stages that finished, in the stages' order. Raises EvidenceError where one is damaged."""
    return [report for stage in STAGES if (report := run.report(stage.name)) is not None]


def answers(run: Run) -> list[dict[str, Any]]:
    """Every question with its answers, or nothing when none was asked."""
    return [dict(row) for row in evidence.maybe_rows(run, layout.ANSWERS)]


def exports(run: Run, listed: Sequence[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every hop that was compared, in order: its evidence, and whether its verdicts (of `listed`) hold (None: none has)."""
    return [found for name in compared(run) if (found := export(run, name, listed or []))]


def compared(run: Run) -> list[str]:
    """The names of the models that may have been compared, in order."""
    return ["merged", *(entry["name"] for entry in evidence.maybe(run, layout.EXPORTS) or [])]


def export(run: Run, name: str, listed: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One hop that was compared, or None; see `exports`."""
    stored = evidence.maybe(run, layout.comparison(name))
    if stored is None:
        return None
    own = [outcome(each) for each in listed if each["name"].endswith(f"[{name}]")]
    return {**stored, "passed": holds(own) if own else None}


@dataclass
class Stored:
    """One run, read file by file; `damaged` has a line for each that could not be read."""

    run: Run
    damaged: list[str] = field(default_factory=list)

    def _try(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except FinetuneError as error:
            why = first_line(error).replace(f"{self.run.path}/", "")
            if why not in self.damaged:
                self.damaged.append(why)
            return None

    def sealed(self) -> None:
        """Name what is not as it was sealed: log, manifest, recipe, reports of stages, and one file of each stage that is not
        as it left it. Files to look at are made anew."""
        of_the_run = (layout.EVENTS.path, layout.MANIFEST.path, layout.RECIPE.path)
        for found in seal.faults(self.run):
            file = found.file.partition(":")[0]
            named = any(line.startswith(file) for line in self.damaged)
            if not named and (file in of_the_run or file.endswith("/report.json")):
                self.damaged.append(str(found))
        for report in self.reports():
            for changed in seal.changed(self.run, report)[:1]:
                if not any(line.startswith(changed.file) for line in self.damaged):
                    self.damaged.append(str(changed))

    def verdicts(self) -> dict[str, Any] | None:
        return self._try(partial(verdicts, self.run))

    def reports(self) -> list[Report]:
        found = [self._try(partial(self.run.report, stage.name)) for stage in STAGES]
        return [report for report in found if report is not None]

    def answers(self) -> list[dict[str, Any]]:
        return self._try(partial(answers, self.run)) or []

    def exports(self, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = self._try(partial(compared, self.run)) or ["merged"]
        found = [self._try(partial(export, self.run, name, listed)) for name in names]
        return [each for each in found if each]

    def events(self) -> list[dict[str, Any]]:
        return self._try(self.run.events) or []

    def steps(self, stage: str) -> list[dict[str, Any]]:
        return [dict(step) for step in self._try(partial(evidence.steps, self.run, stage)) or []]

    def manifest(self) -> dict[str, Any]:
        """Without its seal, which is another as soon as a report lies in the run."""
        found = self._try(self.run.manifest) or {}
        return {key: value for key, value in found.items() if key not in ("seal", "digest")}

    def marks(self) -> list[str]:
        """What has to be known of the trainings beside their verdicts (`run.outcome.marks`)."""
        done = {report.stage: report.metrics for report in self.reports() if report.stage in TRAININGS}
        return marks(self.manifest(), done)

    def perplexities(self) -> dict[str, float]:
        """Perplexity of the held-out text by phase, as far as it was measured."""
        found = self._try(lambda: evidence.maybe(self.run, layout.HELDOUT)) or {}
        return {phase: found[phase]["perplexity"] for phase in PHASES if phase in found}

    def memory(self) -> dict[str, Any] | None:
        found = self._try(lambda: evidence.maybe(self.run, layout.MEMORY))
        return None if found is None else dict(found)

    def recipe(self) -> str:
        there = evidence.there(self.run, layout.RECIPE)
        return (self._try(lambda: evidence.text(self.run, layout.RECIPE)) if there else None) or ""

    def settings(self) -> dict[str, Any]:
        """The recipe with every default filled in, without its token; as it is written where it cannot be loaded here."""
        text = self.recipe()
        path = self.run.path / layout.RECIPE.path
        if not text:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load(path)
            return loaded.model_dump(mode="json", exclude={"model": {"token"}})
        except FinetuneError:
            written = self._try(lambda: parse(text, str(path))[0])
            return written if isinstance(written, dict) else {}


def with_exports(rows: list[dict[str, Any]], hops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with `exports`: what each hop that was compared answered: `text`, `finish`, and whether it is `correct`."""
    return [{**row, "exports": dict(_given(number, row, hops))} if hops else row for number, row in enumerate(rows)]


def _given(number: int, row: dict[str, Any], hops: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for hop in hops:
        for said in hop["answers"][number : number + 1]:  # none where fewer questions were compared
            correct = is_correct(said["text"], row["answer"], row.get("match"))
            yield hop["hop"], {"text": said["text"], "finish": said["finish"], "correct": correct}
