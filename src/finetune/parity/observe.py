"""One model, asked everything there is to ask of it, in a process that knows nothing of the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from finetune.backends import Backend, Serves, get
from finetune.core.errors import StageError, first_line
from finetune.parity import stored
from finetune.run.records.compared import Material

SHORT = 4  # tokens, too few to time


def observe(request: dict[str, Any]) -> dict[str, Any]:
    """Load `model` (and `adapter`) with `backend` and answer the `material`; plain data.

    `answers` are the ids of the first model of the chain to the questions, whose distributions are wanted too; None
    where this is that model. Distributions go to the file `distributions`.
    """
    backend, material = get(request["backend"]), request["material"]
    trust = bool(request["settings"].get("trust_remote_code"))
    model, adapter = Path(request["model"]), Path(request["adapter"]) if request["adapter"] else None
    begin = time.perf_counter()
    handle = backend.load(model, adapter, **request["settings"])
    load_seconds = time.perf_counter() - begin
    try:
        prompts = [question["ids"] for question in material["questions"]]
        made = backend.generate(handle, prompts, max_new_tokens=material["max_new_tokens"])
        answers = request["answers"] or [
            [*answer.ids, *(material["eos_ids"][:1] if answer.finish == "stop" else [])] for answer in made
        ]
        if backend.scores:
            backend.distributions(handle, pairs(material, answers), Path(request["distributions"]))
        speed = _speed(backend, handle, prompts, made)
        tokens = Path(request["prompts_from"])
        tokenizer = backend.tokenizer(tokens, trust_remote_code=trust)
        conversations = [each["messages"] for each in material["conversations"]]
        rendered = backend.render(tokens, conversations, trust_remote_code=trust)
        asked = [each["messages"] for each in material["questions"] if each["messages"]][: request["served"]]
        served = None
        if isinstance(backend, Serves) and asked:
            served = _served(backend, model, asked, material["max_new_tokens"])
    finally:
        if hasattr(handle, "close"):  # a model that was handed to a server
            handle.close()
    return {
        "rendered": rendered,
        "encoded": [tokenizer.encode(each["text"]) for each in (*material["texts"], *material["odd_texts"])],
        "vocabulary": [tokenizer.encode(each["text"]) for each in material["vocabulary"]],
        "template": tokenizer.chat_template,
        "stops": stored.declared_stops(model) if backend.name == "torch" else list(tokenizer.eos_ids),
        "bytes": stored.weight_bytes(model),
        "generated": [{"ids": list(each.ids), "text": each.text, "finish": each.finish} for each in made],
        "answers": answers,
        "served": served,
        "constants": backend.constants(model, trust_remote_code=trust),
        "scores": backend.scores,
        "load_seconds": load_seconds,
        **speed,
    }


def _served(backend: Serves, model: Path, asked: list[Any], most: int) -> list[dict[str, Any]]:
    """What the runtime's own server answers; where it gives none, no text, and why in place of the end."""
    try:
        answered = backend.chat(model, asked, max_new_tokens=most)
    except StageError as error:
        return [{"text": None, "finish": first_line(error)}] * len(asked)
    return [{"text": each.text, "finish": each.finish} for each in answered]


def pairs(material: Material, answers: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """(context, target) of every wanted position: the texts, the rows, then the answers; see `spans`."""
    whole = [*(text["ids"] for text in material["texts"]), *material["rows"]]
    asked = [(question["ids"], answer) for question, answer in zip(material["questions"], answers, strict=True)]
    return [(ids[:1], ids[1:]) for ids in whole if len(ids) > 1] + [pair for pair in asked if pair[1]]


def _speed(backend: Backend, handle: Any, prompts: list[list[int]], answers: list[Any]) -> dict[str, float | None]:
    """Tokens a second, reading the longest prompt and writing the longest answer, timed beyond its first token; None
    where there is nothing to time."""
    if not prompts:
        return {"prompt_tokens_per_second": None, "generation_tokens_per_second": None}
    prompt = max(prompts, key=len)
    first = _seconds(backend, handle, prompt, 1)
    longest = max(range(len(answers)), key=lambda number: len(answers[number].ids))
    count = len(answers[longest].ids)
    rest = 0.0
    if count > SHORT:  # runtimes refuse to write 0 tokens, or write on to the end of the context
        rest = _seconds(backend, handle, prompts[longest], count) - _seconds(backend, handle, prompts[longest], 1)
    return {
        "prompt_tokens_per_second": len(prompt) / first if first > 0 else None,
        "generation_tokens_per_second": (count - 1) / rest if rest > 0 else None,
    }


def _seconds(backend: Backend, handle: Any, prompt: list[int], count: int) -> float:
    begin = time.perf_counter()
    backend.generate(handle, [prompt], max_new_tokens=count)
    return time.perf_counter() - begin
