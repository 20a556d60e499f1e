"""A run's own server, asked what `evaluate` asked, and whether it does what a request says; a check reads what is found.

The server is that of `finetune serve RUN`, in a process of its own, which ends with the experiment in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.backends import Generation, get, tokenizer_of
from finetune.core.errors import StageError, UsageError, first_line
from finetune.data import encode, templates
from finetune.data.tokenizer import Tokenizer
from finetune.parity import prompts
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import Question
from finetune.serving import check_installed, serving

BACKEND = "torch"  # whose server it is: the one that runs the model as it was trained
EACH = 3  # questions of each set
TOKENS = 16  # of an answer to a conversation
TEMPERATURE, SEEDS = 2.0, (1, 2, 3, 4)
TOP_P = 1e-6  # leaves the likeliest token alone
READY_SECONDS, ANSWER_SECONDS = 600.0, 600.0

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, and the answer that the model itself gives: of a question as `evaluate` has it, with what the merged
    model answers to it alone beside it (`again`)."""

    name: str
    kind: str  # question | conversation
    messages: Messages
    prompt_tokens: int
    max_tokens: int
    answer: Generation
    again: Generation


def measure(recipe: Recipe, run: Run, out: Path) -> dict[str, Any]:
    """What the server answered. `asked`: every request with what was expected; `stream`, `stop`, `length`, `sampling`: one
    request each; `special`: texts that must not stand in an answer. Where it refused, the text is None and `refused` says
    why."""
    if recipe.backend != BACKEND:
        raise UsageError(f"expect.serving asks the server of the backend '{BACKEND}', not of '{recipe.backend}'")
    check_installed(BACKEND)
    tokenizer = tokenizer_of(recipe, run.path / layout.MERGED.path)
    source = evidence.chat_template(run)
    render: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": templates.ChatTemplate(name="run", source=source),
        "system": recipe.template.system,
    }
    asked = _asked(recipe, run, render)
    if not asked:
        raise StageError(
            "expect.serving has nothing to ask: name evaluate.probes, evaluate.controls or evaluate.unseen"
        )

    def said(answer: Generation) -> dict[str, Any]:
        return {
            "text": tokenizer.decode(answer.ids, skip_special=True),
            "tokens": len(answer.ids),
            "finish": answer.finish,
        }

    longest = max((each for each in asked if each.kind == "question"), key=lambda each: len(each.answer.ids))
    with serving(run, backend=BACKEND, timeout=READY_SECONDS, proof=True) as address:
        ask = _client(address, recipe.name)
        return {
            "server": BACKEND,
            "asked": [
                {
                    "name": each.name,
                    "kind": each.kind,
                    "max_tokens": each.max_tokens,
                    "expected": {**said(each.answer), "prompt_tokens": each.prompt_tokens},
                    "again": said(each.again)["text"],
                    "found": ask(each.messages, max_tokens=each.max_tokens, temperature=0),
                }
                for each in asked
            ],
            "stream": {
                "name": longest.name,
                "found": ask(longest.messages, max_tokens=longest.max_tokens, temperature=0, stream=True),
            },
            "stop": _stop(ask, longest, said(longest.again)["text"]),
            "length": _length(ask, longest, tokenizer),
            "sampling": _sampling(ask, longest),
            "special": prompts.special_texts(tokenizer, source),
        }


def _asked(recipe: Recipe, run: Run, render: dict[str, Any]) -> list[Asked]:
    questions = _chosen(evidence.maybe_rows(run, layout.ANSWERS), recipe.evaluate.max_new_tokens)
    requests: list[tuple[str, Messages, int, dict[str, Any] | None]] = [
        (a["prompt"], [{"role": "user", "content": a["prompt"]}], recipe.evaluate.max_new_tokens, _final(a))
        for a in questions
    ]
    if questions:
        requests += [(name, messages, TOKENS, None) for name, messages in prompts.CONVERSATIONS.items()]
        # What no training has answers for tells a model from one that was trained a little less.
        texts = (*prompts.TEXTS, *prompts.ODD_TEXTS)
        requests += [(text, [{"role": "user", "content": text}], TOKENS, None) for text in texts]
    rendered = []
    for request in requests:
        try:
            rendered.append((request, encode.prompt_ids(request[1], **render)))
        except UsageError:  # the template has no such conversation
            continue
    backend = get(recipe.backend)
    handle = backend.load(run.path / layout.MERGED.path, None, **evidence.model_settings(recipe, merged=True))
    asked = []
    for (name, messages, most, known), ids in rendered:
        (again,) = backend.generate(handle, [ids], max_new_tokens=most)
        answer = again if known is None else Generation(ids=known["ids"], text=known["text"], finish=known["finish"])
        kind = "conversation" if known is None else "question"
        asked.append(
            Asked(
                name=name, kind=kind, messages=messages, prompt_tokens=len(ids), max_tokens=most, answer=answer,
                again=again,
            )
        )  # fmt: skip
    return asked


def _final(answer: Question) -> dict[str, Any]:
    return dict(list(answer["phases"].values())[-1])


def _chosen(answers: list[Question], most: int) -> list[Question]:
    """A few questions of every set: before others those that the last training answers otherwise, and that end well before
    the last token (of an end as the last one, servers say 'length')."""

    def order(answer: Question) -> tuple[bool, bool]:
        *before, final = answer["phases"].values()
        ended = final["finish"] == "stop" and 0 < len(final["ids"]) < most - 1
        return not ended, bool(before) and before[-1]["text"] == final["text"]

    sets = dict.fromkeys(answer["set"] for answer in answers)
    return [each for name in sets for each in sorted((a for a in answers if a["set"] == name), key=order)[:EACH]]


def _stop(ask: Callable[..., dict[str, Any]], asked: Asked, text: str) -> dict[str, Any]:
    """The last word of an answer as a stop string; of a single word, its end."""
    stop = text.split()[-1] if len(text.split()) > 1 else text[1:] or text
    found = ask(asked.messages, max_tokens=asked.max_tokens, temperature=0, stop=[stop]) if stop else None
    return {"name": asked.name, "stop": stop, "expected": text[: text.find(stop)], "found": found}


def _length(ask: Callable[..., dict[str, Any]], asked: Asked, tokenizer: Tokenizer) -> dict[str, Any]:
    """Half of an answer's tokens."""
    most = max(1, len(asked.again.ids) // 2)
    expected = tokenizer.decode(asked.again.ids[:most], skip_special=True)
    found = ask(asked.messages, max_tokens=most, temperature=0)
    return {"name": asked.name, "max_tokens": most, "expected": expected, "found": found}


def _sampling(ask: Callable[..., dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """One request drawn with several seeds, with the first one again, and with nothing left to draw from."""

    def draw(seed: int, **more: Any) -> str | None:
        found = ask(asked.messages, max_tokens=asked.max_tokens, temperature=TEMPERATURE, seed=seed, **more)
        text: str | None = found["text"]
        return text

    return {
        "name": asked.name,
        "temperature": TEMPERATURE,
        "seeds": list(SEEDS),
        "texts": [draw(seed) for seed in SEEDS],
        "again": draw(SEEDS[0]),
        "greedy": ask(asked.messages, max_tokens=asked.max_tokens, temperature=0)["text"],
        "likeliest_only": [draw(seed, top_p=TOP_P) for seed in SEEDS[:2]],
    }


def _client(address: str, name: str) -> Callable[..., dict[str, Any]]:
    """A function that asks with OpenAI's own client. A request that is refused, or not answered, is an answer too."""
    import httpx2
    import openai

    direct = httpx2.Client(trust_env=False, timeout=ANSWER_SECONDS)  # no proxy stands before this machine's own address
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=direct)

    def ask(messages: Messages, *, stream: bool = False, **options: Any) -> dict[str, Any]:
        request: dict[str, Any] = {"model": name, "messages": list(messages), **options}
        try:
            if stream:
                return _joined(list(client.chat.completions.create(**request, stream=True)))
            answer = client.chat.completions.create(**request)
        except (openai.OpenAIError, httpx2.HTTPError) as error:  # a stream that breaks off is httpx's
            return {"text": None, "finish": None, **_usage(None), "refused": first_line(error)}
        if not answer.choices:
            return {"text": None, "finish": None, **_usage(answer.usage), "refused": "an answer without a choice"}
        return {
            "text": answer.choices[0].message.content or "",
            "finish": answer.choices[0].finish_reason,
            **_usage(answer.usage),
        }

    return ask


def _joined(chunks: list[Any]) -> dict[str, Any]:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    usage = next((chunk.usage for chunk in reversed(chunks) if chunk.usage), None)
    return {
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish": next((choice.finish_reason for choice in reversed(choices) if choice.finish_reason), None),
        **_usage(usage),
    }


def _usage(usage: Any) -> dict[str, int | None]:
    keys = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {key: getattr(usage, key, None) for key in keys}
