"""Records of what a run is made from and how it was trained: the base, the prepared rows, the logged steps."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from finetune.run.records import open_record, record


@record
class FileFacts(TypedDict):
    size: int
    sha256: str


@record
class Fetched(TypedDict):
    """Where the model is: `base` and `adapter` are directories, `files` has the base's by name. `license` is an SPDX id,
    `license_text` a path inside the run. `converted_from`: the files that they were made of, with their SHA-256, where the
    weights were stored otherwise than they are read."""

    path: str
    kind: str
    base: str
    adapter: str | None
    files: dict[str, FileFacts]
    adapter_files: dict[str, FileFacts]
    license: str | None
    license_source: str
    license_text: str | None
    converted_from: NotRequired[dict[str, str]]


@record
class Row(TypedDict):
    """One row as it is trained. A label is the token at its place, or -100 where nothing is learned."""

    row: int
    input_ids: list[int]
    labels: list[int]
    file: str
    line: int


@record
class Pair(TypedDict):
    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    file: str
    line: int


@record
class Template(TypedDict):
    name: str
    sha256: str
    system: str | None


@record
class Rehearsed(TypedDict):
    name: str
    ok: bool


# `eval_loss`, `rewards/margins` and other numbers that a trainer logs go with it.
Step = TypedDict(
    "Step",
    {
        "time": str,
        "step": int,
        "loss": float,
        "learning_rate": float,
        "grad_norm": float | None,
        "seconds": float,
        "tokens": int,
        "trained_tokens": int,
        "epoch": float,
        "rows": list[int],
        "skipped": NotRequired[int],
        "eval_loss": NotRequired[float],
        "rewards/chosen": NotRequired[float],
        "rewards/rejected": NotRequired[float],
        "rewards/margins": NotRequired[float],
    },
)
"""One logged step: loss in nats, `rows` of the prepared file by number, in the order taken; `skipped` counts the steps told
of here that changed nothing."""
open_record(Step)


@record
class Adapted(TypedDict):
    """See `finetune.run.identity.Adaptation`."""

    step: int
    kind: str
    why: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate_share: float


@record
class Account(TypedDict):
    """What the trainer takes the pairs of one more batch to be after the last step; rewards as DPO defines them."""

    step: int
    rows: list[int]
    loss: float
    chosen: float | None
    rejected: float | None
