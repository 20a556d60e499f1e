"""Records of what a model said: answers, scores, held-out text. Log-probabilities are natural."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from annotated_types import Len
from typing_extensions import TypedDict

from finetune.run.records import record

Sum = Annotated[list[float], Len(2, 2)]  # of log-probabilities, and how many tokens they are of

FRESH_QUESTIONS = 8  # so many answers (or rows, or pairs) a fresh process scores


@record
class Answer(TypedDict):
    """One answer: its text, ids and end, whether it is right, and the mean log-probability a token of the right one."""

    text: str
    ids: list[int]
    finish: Literal["stop", "length"]
    correct: bool
    logprob: float


@record
class Question(TypedDict):
    set: Literal["probes", "controls", "unseen"]
    id: str
    kind: str
    prompt: str
    answer: str
    match: str | None
    phases: dict[str, Answer]


@record
class Prompt(TypedDict):
    prompt: str
    ids: list[int]


@record
class Unlikely(TypedDict):
    prompt: str
    position: int
    said: str
    likeliest: str


@record
class Reread(TypedDict):
    """Answers read again in one pass: `gap` is how much likelier (nats) another token was than one that was said; None
    where nothing was said, not even an end of turn."""

    answers: int
    tokens: int
    gap: float | None
    worst: Unlikely | None


@record
class RowScore(TypedDict):
    """[sum of log-probabilities, tokens], over the labelled tokens and over all."""

    answer: Sum
    all: Sum


@record
class HeldOut(TypedDict):
    """Perplexity over all tokens but each text's first; `texts` has [sum of log-probabilities, tokens] of each."""

    perplexity: float
    tokens: int
    texts: list[Sum]


@record
class PairScore(TypedDict):
    """Sums of log-probabilities of both answers of a pair."""

    chosen: float
    rejected: float


@record
class ScoredPair(TypedDict):
    row: int
    phases: dict[str, PairScore]


@record
class Fresh(TypedDict):
    """What a process that knows nothing of the training says of the merged model: means a token by question or row, and
    [sum, tokens] of held-out texts. The template that it found; where that is another one, nothing was asked."""

    template_sha256: str
    of: NotRequired[Literal["answers", "rows", "pairs"]]
    scores: dict[str, float]
    heldout: NotRequired[list[Sum]]
    peak_bytes: NotRequired[int]
