"""Records of exports, and of a model held against the one that it was made from."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

from finetune.run.records import record


@record
class Export(TypedDict):
    """One export: where it is inside the run, what it was made from, and the digest it had when it was made; with those of
    all `files` of its folder, by path inside that."""

    name: str
    path: str
    backend: str | None
    bytes: int
    seconds: float
    mended: list[str]
    notes: list[str]
    made_from: str
    sha256: str
    files: NotRequired[dict[str, str]]  # version 0.1 did not list them


@record
class Difference(TypedDict):
    """The first place where two token sequences part, with what stands around it on both sides."""

    name: str
    position: int
    kind: str
    expected: list[int] | None
    found: list[int] | str | None
    expected_text: NotRequired[str]
    found_text: NotRequired[str]


@record
class Same(TypedDict):
    compared: int
    equal: int
    first: Difference | None


@record
class Stops(TypedDict):
    at: list[int]
    missing: list[int]


@record
class Place(TypedDict):
    after: str
    expected_top5: list[list[Any]]
    found_top5: list[list[Any]]


@record
class Divergences(TypedDict):
    """KL divergence (nats) over positions; `top1` is the share with the same likeliest token."""

    positions: int
    mean: float
    max: float
    top1: float
    answers_mean: float | None
    worst: Place


@record
class Parting(TypedDict):
    prompt: str
    position: int
    expected_text: str
    found_text: str
    expected_next: str
    found_next: str
    expected_top5: NotRequired[list[list[Any]]]
    found_top5: NotRequired[list[list[Any]]]


@record
class Greedy(TypedDict):
    compared: int
    equal: int
    gaps: list[float | None]
    tokens: int
    tokens_agreed: int
    first: Parting | None


@record
class Given(TypedDict):
    text: str
    finish: str


@record
class Leak(TypedDict):
    prompt: str
    token: str
    text: str


@record
class Unstopped(TypedDict):
    prompt: str
    text: str


@record
class Ended(TypedDict):
    compared: int
    stopped: int
    leaks: int
    first_leak: Leak | None
    first_unstopped: Unstopped | None


@record
class Lost(TypedDict):
    prompt: str
    expected: str
    found: str


@record
class Learned(TypedDict):
    known: int
    kept: int
    lost: list[Lost]


@record
class ServedAnswers(TypedDict):
    compared: int
    equal: int
    first: Lost | None


@record
class Constant(TypedDict):
    name: str
    expected: Any
    found: Any


@record
class Constants(TypedDict):
    compared: int
    different: list[Constant]


@record
class Off(TypedDict):
    """A merged weight that is not base + adapter: how many roundings it is away; None where one of the two lacks it."""

    name: str
    roundings: float | None


@record
class Exactness(TypedDict):
    compared: int
    off: list[Off]
    worst: float


@record
class Carried(TypedDict):
    compared: int
    other: list[str]


@record
class Hop(TypedDict):
    """One model against the one before it; None stands for what its runtime does not tell."""

    mark: str
    dtype: str
    hop: str
    reference: str
    backend: str
    path: str
    bytes: int | None
    prompts: Same
    vocabulary: Same
    same_template: bool
    stops: Stops
    bits: float | None
    distributions: Divergences | None
    greedy: Greedy
    answers: list[Given]
    stop: Ended
    learned: Learned
    served: ServedAnswers | None
    constants: Constants
    merge_factor: float | None
    merge: Exactness | None
    adapter: Carried | None
    mended: list[str]
    load_seconds: float
    prompt_tokens_per_second: float | None
    generation_tokens_per_second: float | None
    peak_bytes: int


@record
class Conversation(TypedDict):
    name: str
    messages: list[dict[str, str]]
    ids: list[int] | None


@record
class Text(TypedDict):
    text: str
    ids: list[int]


@record
class Inquiry(TypedDict):
    set: str
    id: str
    prompt: str
    answer: str | None
    match: str | None
    messages: list[dict[str, str]] | None
    ids: list[int]


@record
class Material(TypedDict):
    """What every model of the chain is asked."""

    conversations: list[Conversation]
    texts: list[Text]
    odd_texts: list[Text]
    vocabulary: list[Text]
    rows: list[list[int]]
    questions: list[Inquiry]
    max_new_tokens: int
    special: list[str]
    eos_ids: list[int]
    ends: list[int]
    template: str
