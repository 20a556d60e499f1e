"""What the invariances ask of a backend in a process of its own, besides training; plain data in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.backends import get

NEW_TOKENS = 8


def together(request: dict[str, Any]) -> dict[str, Any]:
    """Rows scored and prompts answered in one batch, where they are padded, and each alone, where they are not.

    `scores` are means over a row's tokens (nats), `answers` over an answer's: of the tokens that the batch, or the prompt
    alone, led to, up to the first that differs. So a tie of two tokens that is broken otherwise is no difference.
    """
    backend, model = get(request["backend"]), Path(request["model"])
    handle = backend.load(model, None, **request["settings"])
    pairs = [(row["input_ids"][:1], row["input_ids"][1:]) for row in request["rows"]]
    prompts = [row["input_ids"][: _prompt(row)] for row in request["rows"]]
    end = list(
        backend.tokenizer(model, trust_remote_code=bool(request["settings"].get("trust_remote_code"))).eos_ids[:1]
    )

    def answers(asked: list[list[int]]) -> list[list[int]]:
        made = backend.generate(handle, asked, max_new_tokens=NEW_TOKENS)
        return [[*each.ids, *(end if each.finish == "stop" else [])] for each in made]

    both = list(zip(answers(prompts), [answers([prompt])[0] for prompt in prompts], strict=True))
    kept = [[answer[: _same(*pair) + 1] for answer in pair] for pair in both]

    def alone(asked: list[tuple[list[int], list[int]]]) -> list[float]:
        return _means([backend.score(handle, [pair])[0] for pair in asked])

    return {
        "scores": _means(backend.score(handle, pairs)),
        "scores_alone": alone(pairs),
        "answers": alone([(prompt, pair[0]) for prompt, pair in zip(prompts, kept, strict=True)]),
        "answers_alone": alone([(prompt, pair[1]) for prompt, pair in zip(prompts, kept, strict=True)]),
    }


def merged(request: dict[str, Any]) -> dict[str, Any]:
    """The mean loss of each row (nats) under the model, with the adapter on it, and merged."""
    backend, settings = get(request["backend"]), request["settings"]
    model, adapter, out = (Path(request[key]) for key in ("model", "adapter", "out"))
    backend.merge(model, adapter, out, **settings)
    pairs = [(row["input_ids"][:1], row["input_ids"][1:]) for row in request["rows"]]

    def means(directory: Path, on: Path | None) -> list[float]:
        return _means(backend.score(backend.load(directory, on, **settings), pairs))

    return {"off": means(model, None), "on": means(model, adapter), "merged": means(out, None)}


def _prompt(row: dict[str, Any]) -> int:
    """How many tokens come before the first trained one; half of them in a row that trains all."""
    first = next(at for at, label in enumerate(row["labels"]) if label != -100)
    return first if first > 1 else len(row["labels"]) // 2


def _means(scores: list[list[float]]) -> list[float]:
    return [-sum(values) / len(values) for values in scores]


def _same(one: list[int], other: list[int]) -> int:
    """How many tokens two answers begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))
