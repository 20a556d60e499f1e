"""`score`, `distributions` and `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from finetune.backends import Generation
from finetune.backends.torch.loading import Handle

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
MAX_BATCH_TOKENS = 1024
MAX_GENERATE_TOKENS = 4096  # a decoding step costs nearly the same for 8 answers as for 40


def _batches(lengths: Sequence[int], most: int = MAX_BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices grouped so that a padded batch stays under `most` tokens; longest first, so that memory fails early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _target_rows(handle: Handle, pairs: Pairs) -> Iterator[tuple[int, Any]]:
    """(index of the pair, log-probabilities: target positions x vocabulary) in no particular order, in float32."""
    if any(not context for context, _ in pairs):
        raise ValueError("every pair needs at least one context token")
    sequences = [[*context, *target] for context, target in pairs]
    for batch in _batches([len(sequence) for sequence in sequences]):
        width = max(len(sequences[i]) for i in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(batch):
            ids[place, : len(sequences[i])] = torch.tensor(sequences[i])
            mask[place, : len(sequences[i])] = 1
        first = min(len(pairs[i][0]) for i in batch) - 1
        logits = handle.model(
            input_ids=ids.to(handle.device), attention_mask=mask.to(handle.device), logits_to_keep=width - first
        ).logits.float()
        for place, i in enumerate(batch):
            context, target = pairs[i]
            begin = len(context) - 1 - first
            yield i, logits[place, begin : begin + len(target)].log_softmax(-1)


@torch.inference_mode()
def score(handle: Handle, pairs: Pairs) -> list[list[float]]:
    """Natural-log probability of each target token given the context and the targets before it.

    `pairs`: (context ids, target ids), at least one context id. Computed in float32 whatever the weights are.
    """
    results: list[list[float]] = [[] for _ in pairs]
    for i, rows in _target_rows(handle, pairs):
        if len(rows):
            targets = torch.tensor(list(pairs[i][1]), device=rows.device)
            results[i] = rows.gather(-1, targets[:, None])[:, 0].tolist()
    return results


def distributions(handle: Handle, pairs: Pairs, out: Path) -> None:
    """Write the log-probabilities of all tokens at all target positions; see Backend.distributions."""
    import numpy

    starts = [0, *accumulate(len(target) for _, target in pairs)]
    shape = (starts[-1], handle.model.get_output_embeddings().weight.shape[0])
    stored = numpy.lib.format.open_memmap(out, mode="w+", dtype=numpy.float32, shape=shape)
    for i, rows in _target_rows(handle, pairs):
        stored[starts[i] : starts[i + 1]] = rows.cpu().numpy()
    stored.flush()


@torch.inference_mode()
def generate(handle: Handle, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
    """Greedy answers, whatever the model's own generation config says. Prompts are padded on the left."""
    eos_ids = handle.tokenizer.eos_ids
    pad = handle.tokenizer.hf.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=pad
    )
    answers: dict[int, Generation] = {}
    for batch in _batches([len(prompt) + max_new_tokens for prompt in prompts], MAX_GENERATE_TOKENS):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(batch):
            ids[place, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[place, width - len(prompts[i]) :] = 1
        output = handle.model.generate(
            input_ids=ids.to(handle.device), attention_mask=mask.to(handle.device), generation_config=config
        )
        for place, i in enumerate(batch):
            answers[i] = _cut(output[place, width:].tolist(), eos_ids, handle)
    return [answers[i] for i in range(len(prompts))]


def _cut(ids: list[int], eos_ids: tuple[int, ...], handle: Handle) -> Generation:
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    kept = ids if end is None else ids[:end]
    return Generation(ids=tuple(kept), text=handle.tokenizer.decode(kept), finish="length" if end is None else "stop")
