"""`score`, `distributions` and `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.backends import Generation
from finetune.backends.llamacpp.loading import Handle, library
from finetune.core.errors import StageError

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
# Inputs are computed in blocks from position 0, and only whole blocks are reused, so that what is reused is bit for
# bit what would be computed again: results do not depend on what was asked before.
BLOCK = 64


def _logits(handle: Handle, ids: Sequence[int], first: int) -> Iterator[Any]:
    """The logits (float32, vocabulary) after each of `ids[first:]`, the cache holding all of `ids` afterwards."""
    import numpy

    batch = library().LlamaBatch(n_tokens=BLOCK, embd=0, n_seq_max=1)
    for begin in range(_reuse(handle, ids, first), len(ids), BLOCK):
        block = ids[begin : begin + BLOCK]
        batch.clear()
        for place, token in enumerate(block, begin):
            batch.add(token, place, [0], place >= first)
        _decode(handle, batch)
        if len(block) == BLOCK:
            handle.cached += block
        for place in range(max(begin, first), begin + len(block)):
            yield numpy.asarray(handle.context.get_logits_ith(place - begin), dtype=numpy.float32)


def _reuse(handle: Handle, ids: Sequence[int], first: int) -> int:
    """How many leading tokens are in the cache already, in whole blocks before `first`; the rest is dropped."""
    same = next((place for place, (a, b) in enumerate(zip(handle.cached, ids, strict=False)) if a != b), None)
    shared = min(len(handle.cached), len(ids)) if same is None else same
    kept = min(shared, first) // BLOCK * BLOCK
    if not kept or not handle.context.memory_seq_rm(0, kept, -1):  # recurrent models cannot go back halfway
        handle.context.kv_cache_clear(False)
        kept = 0
    handle.cached = handle.cached[:kept]
    return kept


def _decode(handle: Handle, batch: Any) -> None:
    try:
        handle.context.decode(batch)
    except (ValueError, RuntimeError) as error:
        raise StageError(f"llama.cpp failed on {handle.model.path_model}: {error}") from None


def _target_rows(handle: Handle, pairs: Pairs) -> Iterator[tuple[int, int, Any]]:
    """(pair, place in its target, log-probabilities of the vocabulary: float64) for every target position."""
    import numpy

    if any(not context for context, _ in pairs):
        raise ValueError("every pair needs at least one context token")
    if not pairs:
        return
    handle.reserve(max(len(context) + len(target) for context, target in pairs), BLOCK)
    for index, (context, target) in enumerate(pairs):
        if not target:
            continue
        ids = [*context, *target[:-1]]
        for place, row in enumerate(_logits(handle, ids, len(context) - 1)):
            exact = row.astype(numpy.float64)
            exact -= exact.max()
            yield index, place, exact - numpy.log(numpy.exp(exact).sum())


def score(handle: Handle, pairs: Pairs) -> list[list[float]]:
    """Natural-log probability of each target token given the context and the targets before it."""
    results: list[list[float]] = [[] for _ in pairs]
    for index, place, row in _target_rows(handle, pairs):
        results[index].append(float(row[pairs[index][1][place]]))
    return results


def distributions(handle: Handle, pairs: Pairs, out: Path) -> None:
    """Write the log-probabilities of all tokens at all target positions, one row at a time; see the protocol."""
    import numpy

    starts = [0, *accumulate(len(target) for _, target in pairs)]
    shape = (starts[-1], handle.tokenizer.vocab_size)
    stored = numpy.lib.format.open_memmap(out, mode="w+", dtype=numpy.float32, shape=shape)
    for index, place, row in _target_rows(handle, pairs):
        stored[starts[index] + place] = row
    stored.flush()


def generate(handle: Handle, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
    """Greedy answers, one prompt at a time, ended by llama.cpp's own rule (`llama_vocab_is_eog`)."""
    if not prompts:
        return []
    handle.reserve(max(map(len, prompts)) + max_new_tokens, BLOCK)
    return [_answer(handle, list(prompt), max_new_tokens) for prompt in prompts]


def _answer(handle: Handle, prompt: list[int], most: int) -> Generation:
    import numpy

    (row,) = _logits(handle, prompt, len(prompt) - 1)
    batch = library().LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
    made: list[int] = []
    finish = "length"
    while len(made) < most:
        token = int(numpy.argmax(row))
        if handle.tokenizer.ends_turn(token):
            finish = "stop"
            break
        made.append(token)
        if len(made) < most:
            batch.clear()
            batch.add(token, len(prompt) + len(made) - 1, [0], True)
            _decode(handle, batch)
            row = handle.context.get_logits_ith(0)
    return Generation(ids=tuple(made), text=handle.tokenizer.decode(made), finish=finish)
