"""Perplexity of a text by a reference model: how little a model that reads English expects it.

docs/perplexity.md has what kinds of text score, and the bounds that follow from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune import backends
from finetune.backends import Backend
from finetune.core import hub
from finetune.core.errors import FinetuneError, UsageError
from finetune.models import sources
from finetune.recipe.sections import Model

EMBEDDED, USUAL = "smollm2-135m", "gpt2"
WINDOW = 1024  # tokens scored at once; each later token of a longer text sees at least half as many before it
HUB_SECONDS = 5.0

# Scorer: the lowest perplexity that 200 texts of random tokens got (bench/perplexity.py); a bound from here on is none.
RANDOM_TOKENS_FROM: dict[str, float] = {EMBEDDED: 2.6e5}


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """`value` is exp(mean cross-entropy, in nats) of the completion's tokens given the prompt, `whole` that of prompt
    and completion together (None without a prompt), `tokens` how many of the completion's tokens were scored,
    `distinct` the share of different ids among the completion's tokens, `scorer` the reference model.

    `value` and `whole` may be infinite or NaN, which no bound allows.
    """

    value: float
    whole: float | None
    tokens: int
    distinct: float
    scorer: str


@dataclass(frozen=True)
class Scorer:
    """A loaded reference model."""

    name: str
    backend: Backend
    tokenizer: Any
    handle: Any
    window: int = WINDOW


def perplexity(completion: str, prompt: str = "", *, scorer: str | None = None) -> Perplexity:
    """Score a completion as plain text, without a chat template. `scorer` is any model; `default_scorer()` if None.

    Prompt and completion are tokenized together, as a reader meets them. A token is the completion's if its text, less
    spaces at its head, begins there: ' Paris' after the prompt 'It is ' is, 'unbelievable' after 'unbe' is not. The very
    first token is scored only where the tokenizer itself begins texts with a token (Llama's does, GPT-2's and SmolLM2's
    do not). Texts of more than WINDOW tokens are scored in windows.

    Raises UsageError where no token of the completion can be scored.
    """
    return measure(load(scorer or default_scorer()), completion, prompt)


def default_scorer() -> str:
    """FT_SCORER, else gpt2 where it is in the hub's cache or can be downloaded, else the embedded model."""
    return os.environ.get("FT_SCORER") or _usual_or_embedded()


@cache
def load(name: str) -> Scorer:
    """The model of that name (as under `model.path`), loaded once a process: float32, on the CPU."""
    found = sources.resolve(Model(path=name)) if name != USUAL else sources.Resolved(hub.snapshot(name), None, "hub")
    backend = backends.get("fake" if (found.base / "fake_model.json").is_file() else "torch")
    most = backend.constants(found.base).get("max_position_embeddings")
    return Scorer(
        name=name,
        backend=backend,
        tokenizer=backend.tokenizer(found.base),
        handle=backend.load(found.base, found.adapter, device="cpu", dtype="float32"),
        window=min(WINDOW, int(most)) if most else WINDOW,
    )


def measure(scorer: Scorer, completion: str, prompt: str = "") -> Perplexity:
    """`perplexity` by a loaded scorer."""
    if not completion:
        raise UsageError("the completion is empty, so it has no perplexity: the model answered nothing")
    # Half of a surrogate pair is one character that no tokenizer takes; '?' keeps every place as it was.
    text = (prompt + completion).encode("utf-8", "replace").decode("utf-8")
    ids, spans = scorer.tokenizer.spans(text)
    own = [place for place, span in enumerate(spans) if _begin(text, *span) >= len(prompt)]
    bos = scorer.tokenizer.bos_token
    begun = bool(scorer.tokenizer.adds_bos and bos and not text.startswith(bos))
    first = 0 if begun else 1  # the first token that has one before it
    scored = [place for place in own if place >= first]
    if not scored:
        why = "nothing comes before its only token" if own else "its characters belong to the prompt's last token"
        raise UsageError(
            f"the completion {completion[:40]!r} cannot be scored by {scorer.name}: {why}. Score a longer one"
        )
    sequence = [*(scorer.tokenizer.encode(bos) if begun else ()), *ids]
    parts = scorer.backend.score(scorer.handle, list(_windows(sequence, scorer.window)))
    logs = [value for part in parts for value in part]  # of the tokens from `first` on
    return Perplexity(
        value=_exp_mean([logs[place - first] for place in scored]),
        whole=_exp_mean(logs) if prompt else None,
        tokens=len(scored),
        distinct=len({ids[place] for place in own}) / len(own),
        scorer=scorer.name,
    )


def _begin(text: str, begin: int, end: int) -> int:
    """Where a token's text begins, spaces at its head left out; of a token of spaces only, where it begins."""
    piece = text[begin:end]
    return begin + len(piece) - len(piece.lstrip()) if piece.strip() else begin


def _windows(ids: Sequence[int], most: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, targets) pairs that together hold every id but the first as a target, in order, `most` ids a pair."""
    yield ids[:1], ids[1:most]
    step = most - most // 2
    for at in range(most, len(ids), step):
        yield ids[at - most // 2 : at], ids[at : at + step]


def _exp_mean(logs: Sequence[float]) -> float:
    try:
        return math.exp(-math.fsum(logs) / len(logs))
    except OverflowError:
        return math.inf


@cache
def _usual_or_embedded() -> str:
    try:
        if _reachable(USUAL):
            hub.snapshot(USUAL)
            return USUAL
    except FinetuneError:
        pass
    return EMBEDDED


def _reachable(repo: str) -> bool:
    """Whether a repository is in the hub's cache, or the hub answers for it soon; `hub.snapshot` knows no time limit."""
    try:
        from huggingface_hub import HfApi, constants, try_to_load_from_cache
    except ModuleNotFoundError:
        return False
    if isinstance(try_to_load_from_cache(repo, "config.json"), str):
        return True
    if constants.is_offline_mode():
        return False
    try:
        HfApi().model_info(repo, timeout=HUB_SECONDS)
    except Exception:  # whatever keeps the hub from answering, the embedded model does as well
        return False
    return True
