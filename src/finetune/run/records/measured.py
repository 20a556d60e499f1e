"""Records of the experiments: memory, resuming, serving, invariances."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

from finetune.run.records import record


@record
class StoredBytes(TypedDict):
    base: int
    adapter: int
    optimizer: int | None


@record
class MemorySide(TypedDict):
    """Bytes of one training; `estimated` is what `finetune estimate` says, by part."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    training_state_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None
    tokens: list[int]
    losses: list[float]
    estimated: dict[str, Any]


@record
class Memory(TypedDict):
    batch_size: int
    tokens_per_row: int
    dtype: str
    tokens: int
    stored: StoredBytes
    lora: MemorySide
    full: MemorySide


@record
class Resumed(TypedDict):
    """The last part of the training, as it went and trained again from a checkpoint; losses by step."""

    from_step: int
    to_step: int
    parameters: int | None
    parameters_resumed: int | None
    losses: dict[str, float]
    losses_resumed: dict[str, float]
    tensors: int
    tensors_differing: list[str]


@record
class Told(TypedDict):
    """What a server answered to one request; no text where it refused, and why."""

    text: str | None
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    refused: NotRequired[str]  # where it did


@record
class Expected(TypedDict):
    text: str
    tokens: int
    finish: str
    prompt_tokens: int


@record
class Asked(TypedDict):
    name: str
    kind: str
    max_tokens: int
    expected: Expected
    again: str
    found: Told


@record
class Streamed(TypedDict):
    name: str
    found: Told


@record
class Stopped(TypedDict):
    name: str
    stop: str
    expected: str
    found: Told | None


@record
class Lengthened(TypedDict):
    name: str
    max_tokens: int
    expected: str
    found: Told


@record
class Sampled(TypedDict):
    """Answers drawn with each seed, and with the first one again; None where the server refused."""

    name: str
    temperature: float
    seeds: list[int]
    texts: list[str | None]
    again: str | None
    greedy: str | None
    likeliest_only: list[str | None]


@record
class Served(TypedDict):
    server: str
    asked: list[Asked]
    stream: Streamed
    stop: Stopped
    length: Lengthened
    sampling: Sampled
    special: list[str]


@record
class Sequence(TypedDict):
    """What one of two trainings (or scorings) gave, in order; `what` says which."""

    what: str
    losses: list[float]
    rows: NotRequired[list[list[int]]]
    gradients: NotRequired[list[float | None]]


@record
class Comparison(TypedDict):
    one: Sequence
    other: Sequence
    of: str
    note: NotRequired[str]


@record
class Invariance(TypedDict, total=False):
    comparisons: list[Comparison]
    first: Sequence  # of the order of rows
    again: Sequence
    other_seed: Sequence
    off: list[float]  # losses without the adapter that was merged
    used: bool
    not_applicable: str


@record
class Invariances(TypedDict):
    backend: str
    architecture: str
    tokens: list[int]
    trained_tokens: list[int]
    options: dict[str, Any]
    settings: dict[str, Any]
    invariances: dict[str, Invariance]
