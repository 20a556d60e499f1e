"""What is wrong with encoded rows, before any training: over-long, repeated, contradicting, nothing left to train."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.core.errors import DataError
from finetune.data.encode import IGNORED, Encoded, encode_all, encode_pair, pair_length, truncate
from finetune.data.faults import plural, raise_all
from finetune.data.formats import Example
from finetune.data.templates import ChatTemplate
from finetune.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from finetune.recipe.sections import Data

R = TypeVar("R")


def check(
    encoded: list[Encoded], data: Data, max_length: int, *, eos_ids: Sequence[int]
) -> tuple[list[Encoded], list[str]]:
    """The rows to train on, by the recipe's `on_overlong` and `on_duplicate`, and notes for the user.

    Raises DataError with every fault, each with file and line.
    """
    faults: list[str] = []
    notes: list[str] = []
    for row in encoded:
        if not row.trained:
            faults.append(f"{_at(row)}: no token is trained: the row has no answer")
        elif not _ends(row, eos_ids):
            faults.append(f"{_at(row)}: no end-of-turn token is trained: the model would not learn to stop")
    kept = _fitting(encoded, data, max_length, faults, notes)
    unended = [row for row in kept if row.lost_answer_tokens]
    if unended:
        lost = sum(row.lost_answer_tokens for row in unended)
        notes.append(
            f"{plural(len(unended), 'row')} cut to {max_length} tokens, {plural(lost, 'answer token')} lost with the "
            f"end-of-turn token (first: {_at(unended[0])}): those rows do not teach the model to stop"
        )
    kept = _unrepeated(kept, data, lambda row: (tuple(row.input_ids), tuple(row.labels)), _at, faults, notes)
    notes += _contradictions(kept)
    if not kept and not faults:
        faults.append(f"{', '.join(data.paths)}: no row is left (of {len(encoded)})")
    raise_all(f"the data cannot be trained on ({plural(len(faults), 'fault')}):", faults)
    return kept, notes


def preferences(
    examples: Iterable[Example],
    data: Data,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    max_length: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Preference pairs as `encode_preference` gives them, and notes, by the same rules as `check`.

    Truncation shortens the answers; a prompt that leaves no room for one is a fault.
    """
    faults: list[str] = []
    notes: list[str] = []
    kept: list[dict[str, Any]] = []
    dropped = cut = 0
    pairs = encode_all(examples, partial(encode_pair, tokenizer=tokenizer, template=template, system=system))
    for pair in pairs:
        length, room = pair_length(pair), max_length - len(pair["prompt_ids"])
        if length <= max_length:
            kept.append(pair)
        elif data.on_overlong == "drop":
            dropped += 1
        elif data.on_overlong == "truncate" and room > 0:
            cut += 1
            kept.append({**pair, "chosen_ids": pair["chosen_ids"][:room], "rejected_ids": pair["rejected_ids"][:room]})
        else:
            faults.append(f"{_pair_at(pair)}: {_too_long(length, max_length)}, {len(pair['prompt_ids'])} of the prompt")
    if dropped:
        notes.append(f"{plural(dropped, 'pair')} over {max_length} tokens dropped")
    if cut:
        notes.append(f"{plural(cut, 'pair')} cut to {max_length} tokens; the end of an answer is lost there")
    kept = _unrepeated(
        kept, data, lambda pair: (*map(tuple, (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])),),
        _pair_at, faults, notes,
    )  # fmt: skip
    chosen = {(tuple(pair["prompt_ids"]), tuple(pair["chosen_ids"])): pair for pair in reversed(kept)}
    for pair in kept:
        other = chosen.get((tuple(pair["prompt_ids"]), tuple(pair["rejected_ids"])))
        if other is not None:
            faults.append(f"{_pair_at(pair)} rejects the answer that {_pair_at(other)} chooses")
    if not kept and not faults:
        faults.append(f"{', '.join(data.paths)}: no pair is left (of {len(pairs)})")
    raise_all(f"the preference data cannot be trained on ({plural(len(faults), 'fault')}):", faults)
    return kept, notes


def split(encoded: list[Encoded], fraction: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to train on and rows held out, the same for the same seed; copies of a row stay on one side.

    At least one row is held out when `fraction` is above 0. Raises DataError when that leaves none to train on.
    """
    if fraction <= 0:
        return list(encoded), []
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(encoded):
        groups[tuple(row.input_ids)].append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, round(len(encoded) * fraction))
    held: set[int] = set()
    for group in order[:-1]:
        if len(held) >= wanted:
            break
        held.update(group)
    if not held:
        raise DataError(
            "the data cannot be split:",
            [f"{plural(len(order), 'distinct row')}: none is left to train on when data.eval_fraction is {fraction}"],
        )
    return (
        [row for index, row in enumerate(encoded) if index not in held],
        [row for index, row in enumerate(encoded) if index in held],
    )


def _at(row: Encoded) -> str:
    return f"{row.file}:{row.line}"


def _pair_at(pair: dict[str, Any]) -> str:
    return f"{pair['file']}:{pair['line']}"


def _too_long(length: int, limit: int) -> str:
    return f"{length} tokens, over the limit of {limit} (max_length)"


def _ends(row: Encoded, eos_ids: Sequence[int]) -> bool:
    """Whether the last trained token ends a turn (a row already cut short has been counted as such)."""
    last = next(label for label in reversed(row.labels) if label != IGNORED)
    return last in eos_ids or row.lost_answer_tokens > 0


def _fitting(encoded: list[Encoded], data: Data, max_length: int, faults: list[str], notes: list[str]) -> list[Encoded]:
    """The rows of at most `max_length` tokens, after dropping or cutting; the others are faults."""
    kept: list[Encoded] = []
    dropped: list[Encoded] = []
    for row in encoded:
        if not row.trained or len(row.input_ids) <= max_length:
            kept.append(row)
            continue
        short = truncate(row, max_length)
        lost = plural(short.lost_answer_tokens, "answer token")
        if data.on_overlong == "drop":
            dropped.append(row)
        elif data.on_overlong == "truncate" and short.trained:
            kept.append(short)
        elif data.on_overlong == "truncate":
            faults.append(
                f"{_at(row)}: {_too_long(len(row.input_ids), max_length)}; cut there, no answer token is left"
            )
        else:
            faults.append(
                f"{_at(row)}: {_too_long(len(row.input_ids), max_length)}; cutting it would lose {lost}. "
                "Raise max_length, or set data.on_overlong to drop or truncate."
            )
    if dropped:
        notes.append(f"{plural(len(dropped), 'row')} over {max_length} tokens dropped (first: {_at(dropped[0])})")
    return kept


def _unrepeated(
    rows: list[R],
    data: Data,
    key: Callable[[R], Hashable],
    at: Callable[[R], str],
    faults: list[str],
    notes: list[str],
) -> list[R]:
    """The rows without repeats where `on_duplicate` is drop; otherwise all, with a note or with faults."""
    first: dict[Hashable, R] = {}
    repeats: list[tuple[R, R]] = []
    for row in rows:
        original = first.setdefault(key(row), row)
        if original is not row:
            repeats.append((row, original))
    if not repeats:
        return rows
    example = f"{at(repeats[0][0])} repeats {at(repeats[0][1])}"
    if data.on_duplicate == "error":
        faults += [f"{at(row)}: repeats {at(original)}" for row, original in repeats]
    elif data.on_duplicate == "drop":
        notes.append(f"{plural(len(repeats), 'repeated row')} dropped (first: {example})")
        return list(first.values())
    else:
        notes.append(f"{plural(len(repeats), 'repeated row')} kept (first: {example}); data.on_duplicate can drop them")
    return rows


def _contradictions(rows: list[Encoded]) -> list[str]:
    """A note where the same prompt is given different first answers."""
    answers: dict[tuple[int, ...], dict[tuple[int, ...], Encoded]] = defaultdict(dict)
    for row in rows:
        start = next(index for index, label in enumerate(row.labels) if label != IGNORED) if row.trained else 0
        end = next((i for i in range(start, len(row.labels)) if row.labels[i] == IGNORED), len(row.labels))
        if start:
            answers[tuple(row.input_ids[:start])].setdefault(tuple(row.input_ids[start:end]), row)
    clashes = [list(different.values()) for different in answers.values() if len(different) > 1]
    if not clashes:
        return []
    total = len(clashes)
    first = f"{_at(clashes[0][1])} against {_at(clashes[0][0])}"
    return [f"{plural(total, 'prompt')} answered in different ways (first: {first}); the model cannot learn both"]
