"""`score`, `distributions` and `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy

from finetune.backends import Generation
from finetune.backends.mlx.loading import Handle
from finetune.backends.mlx.runtime import mx, on

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
MAX_BATCH_TOKENS = 1024
CHUNK = 32  # tokens of a prompt computed at once


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped so that a padded batch stays under MAX_BATCH_TOKENS; longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _target_rows(handle: Handle, pairs: Pairs) -> Iterator[tuple[int, Any]]:
    """(index of the pair, log-probabilities: target positions x vocabulary) in no particular order.

    Padding stands on the right, where no earlier position sees it.
    """
    if any(not context for context, _ in pairs):
        raise ValueError("every pair needs at least one context token")
    sequences = [[*context, *target] for context, target in pairs]
    for batch in _batches([len(sequence) for sequence in sequences]):
        width = max(len(sequences[i]) for i in batch)
        ids = mx.array([sequences[i] + [0] * (width - len(sequences[i])) for i in batch])
        logits = handle.model(ids)
        for place, i in enumerate(batch):
            context, target = pairs[i]
            if target:
                begin = len(context) - 1
                rows = logits[place, begin : begin + len(target)].astype(mx.float32)
                yield i, _log_probabilities(numpy.array(rows))


def _log_probabilities(logits: Any) -> Any:
    """Rows of logits as log-probabilities (float32), added up in float64: MLX's own sum is off by 1e-4 at 49152 tokens."""
    highest = logits.max(-1, keepdims=True)
    shifted = logits.astype(numpy.float64) - highest
    return (shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))).astype(numpy.float32)


def score(handle: Handle, pairs: Pairs) -> list[list[float]]:
    """Natural-log probability of each target token given the context and the targets before it; see Backend.score."""
    results: list[list[float]] = [[] for _ in pairs]
    with on(handle.device):
        for i, rows in _target_rows(handle, pairs):
            results[i] = rows[range(len(rows)), list(pairs[i][1])].tolist()
    return results


def distributions(handle: Handle, pairs: Pairs, out: Path) -> None:
    """Write the log-probabilities of all tokens at all target positions; see Backend.distributions."""
    starts = [0, *accumulate(len(target) for _, target in pairs)]
    stored: Any = None
    with on(handle.device):
        for i, rows in _target_rows(handle, pairs):
            if stored is None:  # the model alone knows how wide its answers are
                shape = (starts[-1], rows.shape[-1])
                stored = numpy.lib.format.open_memmap(out, mode="w+", dtype=numpy.float32, shape=shape)
            stored[starts[i] : starts[i + 1]] = rows
    if stored is None:
        numpy.save(out, numpy.zeros((0, handle.tokenizer.vocab_size), numpy.float32))
    else:
        stored.flush()


def generate(handle: Handle, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
    """Greedy answers, one after the other, each ended by what mlx-lm takes for an end of turn.

    Prompts are computed in chunks that begin at multiples of CHUNK, and whole chunks that a prompt shares with the one
    before are kept: the same products either way, so an answer never depends on its neighbours.
    """
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

    answers = []
    cache: Any = None
    before: list[int] = []
    with on(handle.device):
        for prompt in map(list, prompts):
            kept = _shared(before, prompt)
            held = cache[0].offset if cache else 0
            if kept and can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, held - kept)
            else:
                cache, kept = make_prompt_cache(handle.model), 0
            answers.append(_answer(handle, prompt, kept, cache, max_new_tokens))
            before = prompt
    return answers


def _shared(before: list[int], prompt: list[int]) -> int:
    """How many tokens of whole chunks two prompts begin with alike, less each one's last token."""
    same = 0
    for mine, other in zip(prompt[:-1], before[:-1], strict=False):
        if mine != other:
            break
        same += 1
    return same - same % CHUNK


def _answer(handle: Handle, prompt: list[int], done: int, cache: Any, max_new_tokens: int) -> Generation:
    last = len(prompt) - 1
    while done < last:
        end = min(last, done - done % CHUNK + CHUNK)
        handle.model(mx.array([prompt[done:end]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        done = end
    ids: list[int] = []
    token, finish = prompt[-1], "length"
    while len(ids) < max_new_tokens:
        likeliest: Any = mx.argmax(handle.model(mx.array([[token]]), cache=cache)[0, -1]).item()
        token = int(likeliest)
        if token in handle.tokenizer.eos_ids:
            finish = "stop"
            break
        ids.append(token)
    return Generation(ids=tuple(ids), text=handle.tokenizer.decode(ids), finish=finish)
