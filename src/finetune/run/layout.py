"""Every file that a run may hold: its path, the record in it, the stage that writes it, and the checks that read it.

Stages write these files and checks read them through `finetune.run.evidence`, and by no other way. What is no record
(weights, a template, an export) is declared as a `Tree` or a `Text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from finetune.core import schemas
from finetune.core.schemas import Schema
from finetune.run.records import compared, evaluated, measured, trained, whole

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class File:
    """One row. `read_by` are the checks that stand on it; a test holds that against what they open."""

    path: str
    stage: str | None  # None: written by commands, whatever the stage
    read_by: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document(File, Generic[R]):
    """A JSON file with one record (or a list or mapping of them). `schema` where the file says its own number; the others
    are of the report of their stage."""

    record: type[R]
    schema: Schema | None = None


@dataclass(frozen=True, kw_only=True)
class Rows(File, Generic[R]):
    """A JSONL file, one record a line."""

    record: type[R]


@dataclass(frozen=True, kw_only=True)
class Text(File):
    """A file of text."""


@dataclass(frozen=True, kw_only=True)
class Tree(File):
    """A folder, or a file that other libraries define."""


MANIFEST = Document(path="manifest.json", stage=None, record=whole.Manifest, read_by=("seal",), schema=schemas.MANIFEST)
RECIPE = Text(path="recipe.yaml", stage=None, read_by=("seal",))
EVENTS = Text(path="events.jsonl", stage=None, read_by=("seal", "rows", "loss", "optimizer", "preference"))
VERDICTS = Document(
    path="verdicts.json", stage=None, record=whole.StoredVerdicts, read_by=("seal",), schema=schemas.VERDICTS
)

MODEL = Document(path="fetch/model.json", stage="fetch", record=trained.Fetched)
LICENSE = Text(path="fetch/LICENSE", stage="fetch")

TRAIN_ROWS = Rows(path="prepare/train.jsonl", stage="prepare", record=trained.Row)
EVAL_ROWS = Rows(path="prepare/eval.jsonl", stage="prepare", record=trained.Row)
PAIRS = Rows(path="prepare/preferences.jsonl", stage="prepare", record=trained.Pair)
TEMPLATE = Document(path="prepare/template.json", stage="prepare", record=trained.Template)
CHAT_TEMPLATE = Text(path="prepare/chat_template.jinja", stage="prepare")
PREVIEW = Text(path="prepare/preview.txt", stage="prepare")
SOURCES = Document(path="prepare/sources.json", stage="prepare", record=dict[str, str])

REHEARSED = Document(path="rehearse/exports.json", stage="rehearse", record=list[trained.Rehearsed])

INITIAL = Tree(path="train/initial", stage="train", read_by=("parameters",))
TRAINED = Tree(path="train/adapter", stage="train", read_by=("parameters", "artifacts"))
TRAINED_MODEL = Tree(path="train/model", stage="train", read_by=("parameters", "artifacts"))
TRAIN_LOGS = Document(path="train/trainer_logs.json", stage="train", record=list[trained.Step])
ALIGN_INITIAL = Tree(path="align/initial", stage="align")
ALIGNED = Tree(path="align/adapter", stage="align", read_by=("artifacts",))
ALIGNED_MODEL = Tree(path="align/model", stage="align", read_by=("artifacts",))
ALIGN_LOGS = Document(path="align/trainer_logs.json", stage="align", record=list[trained.Step])
REWARDS = Document(path="align/rewards.json", stage="align", record=trained.Account)

ANSWERS = Rows(path="evaluate/answers.jsonl", stage="evaluate", record=evaluated.Question)
PROMPTS = Rows(path="evaluate/prompts.jsonl", stage="evaluate", record=evaluated.Prompt)
GREEDY = Document(path="evaluate/greedy.json", stage="evaluate", record=dict[str, evaluated.Reread])
ROW_SCORES = Document(path="evaluate/rows.json", stage="evaluate", record=dict[str, dict[str, evaluated.RowScore]])
HELDOUT = Document(path="evaluate/heldout.json", stage="evaluate", record=dict[str, evaluated.HeldOut])
SCORED_PAIRS = Rows(path="evaluate/preferences.jsonl", stage="evaluate", record=evaluated.ScoredPair)

MERGED = Tree(path="merge/model", stage="merge", read_by=("artifacts",))

FRESH = Document(path="measure/fresh.json", stage="measure", record=evaluated.Fresh)
MEMORY = Document(path="measure/memory.json", stage="measure", record=measured.Memory)
RESUME = Document(path="measure/resume.json", stage="measure", record=measured.Resumed)
SERVING = Document(path="measure/serving.json", stage="measure", record=measured.Served)
INVARIANCE = Document(path="measure/invariance.json", stage="measure", record=measured.Invariances)

EXPORTS = Document(path="export/exports.json", stage="export", record=list[compared.Export])
MATERIAL = Document(path="compare/material.json", stage="compare", record=compared.Material)

REPORTS: dict[str, Document[Any]] = {
    stage: Document(path=f"{stage}/report.json", stage=stage, record=record, schema=schemas.REPORT)
    for stage, record in {
        "fetch": whole.FetchReport,
        "prepare": whole.PrepareReport,
        "rehearse": whole.CountReport,
        "train": whole.TrainReport,
        "align": whole.TrainReport,
        "evaluate": whole.EvaluateReport,
        "merge": whole.CountReport,
        "measure": whole.CountReport,
        "export": whole.CountReport,
        "compare": whole.CountReport,
    }.items()
}
PREPARED: Document[whole.PrepareReport] = REPORTS["prepare"]
SFT: Document[whole.TrainReport] = REPORTS["train"]
DPO: Document[whole.TrainReport] = REPORTS["align"]
TRAININGS: dict[str, Document[whole.TrainReport]] = {"train": SFT, "align": DPO}


def report(stage: str) -> Document[Any]:
    """The row of a stage's report."""
    return REPORTS[stage]


def comparison(name: str) -> Document[compared.Hop]:
    """The row of what was seen of one model of the chain: `merged`, or an export's name."""
    path = f"compare/{name.replace(':', '-')}.json"
    return Document(path=path, stage="compare", record=compared.Hop, read_by=("parity",))


FILES: tuple[File, ...] = (
    *(row for row in list(globals().values()) if isinstance(row, File) and row not in REPORTS.values()),
    *REPORTS.values(),
)
