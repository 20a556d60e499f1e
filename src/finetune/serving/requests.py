"""What a request to an OpenAI-compatible server may say, checked before any server sees it: the same words for all.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.templates import with_system

ROLES = ("system", "user", "assistant", "tool")
STOPS = 4
SEEDS = 2**32
# They would let a request load other files, or go round these checks.
FORBIDDEN = ("adapters", "draft_model", "generation_config")
# Values that ask for nothing, besides null, false, 0 and what is empty.
NEUTRAL: dict[str, Any] = {"n": 1, "best_of": 1, "response_format": {"type": "text"}}


class Refused(Exception):
    """A request that cannot be answered; `error` is the object that an OpenAI client reads."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = error(message, status=status, param=param, code=code)


def error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error, as OpenAI's API has it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown_model(asked: object, name: str) -> Refused:
    message = f"there is no model '{asked}' here. This server has '{name}'; name it, or leave 'model' out"
    return Refused(message, status=404, param="model", code="model_not_found")


def checked(
    body: bytes, *, chat: bool, name: str, system: str | None = None, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The request in a body, with the model's name in it, its texts plain strings, and `system` first where a
    conversation has no system message. `ignored` are fields that the server would pass over in silence.

    Raises Refused.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise Refused(f"the body is not JSON: {problem}") from None
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object, not {type(found).__name__}")
    given: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    if given.setdefault("model", name) != name:
        raise unknown_model(given["model"], name)
    for key in FORBIDDEN:
        if key in given:
            raise Refused(f"'{key}' cannot be chosen by a request: this server has one model", param=key)
    for key in ignored:
        if given.get(key) and given[key] != NEUTRAL.get(key):
            raise Refused(f"'{key}' is not supported by this server; leave it out", param=key, code="unsupported")
    _check_numbers(given)
    _check_stop(given)
    _check_bias(given)
    if not isinstance(given.get("stream", False), bool):
        raise Refused(f"'stream' must be true or false, not {_shown(given['stream'])}", param="stream")
    if chat:
        messages = [_message(number, message) for number, message in enumerate(_list(given, "messages"))]
        given["messages"] = list(with_system(messages, system))
    else:
        given["prompt"] = _prompt(given)
    return given


def _check_numbers(given: Mapping[str, Any]) -> None:
    for key in ("max_tokens", "max_completion_tokens"):
        _number(given, key, at_least=1, whole=True)
    _number(given, "seed", at_least=0, at_most=SEEDS - 1, whole=True)
    _number(given, "temperature", at_least=0, at_most=2)
    _number(given, "top_p", at_least=0, at_most=1)
    if given.get("top_p") == 0:
        raise Refused("'top_p' must be above 0; for the likeliest token set 'temperature' to 0", param="top_p")
    for key in ("presence_penalty", "frequency_penalty"):
        _number(given, key, at_least=-2, at_most=2)


def _number(
    given: Mapping[str, Any], key: str, *, at_least: int, at_most: int | None = None, whole: bool = False
) -> None:
    value = given.get(key, at_least)
    kind = "a whole number" if whole else "a number"
    bounds = f"of {at_least} or more" if at_most is None else f"from {at_least} to {at_most}"
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not at_least <= value <= (value if at_most is None else at_most):
        raise Refused(f"'{key}' must be {kind} {bounds}, not {_shown(value)}", param=key)


def _check_stop(given: Mapping[str, Any]) -> None:
    stop = given.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or len(texts) > STOPS or not all(isinstance(each, str) and each for each in texts):
        raise Refused(f"'stop' must be a text, or a list of up to {STOPS} texts, none of them empty", param="stop")


def _check_bias(given: Mapping[str, Any]) -> None:
    bias = given.get("logit_bias", {})
    if not isinstance(bias, dict) or not all(
        token.isdecimal() and type(value) in (int, float) and -100 <= value <= 100 for token, value in bias.items()
    ):
        raise Refused("'logit_bias' must map ids of tokens to numbers from -100 to 100", param="logit_bias")


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    if not isinstance(found, list) or not found:
        raise Refused(f"'{key}' must be a list of at least one message", param=key)
    return found


def _message(number: int, message: Any) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Refused(f"'{where}' must be an object with 'role' and 'content'", param=where)
    if message.get("role") not in ROLES:
        known = ", ".join(ROLES)
        raise Refused(
            f"'{where}.role' must be one of {known}, not {_shown(message.get('role'))}", param=f"{where}.role"
        )
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise Refused(
            f"'{where}.content' must be a text, or a list of parts of the type 'text'", param=f"{where}.content"
        )
    return {**message, "content": content or ""}


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused("'prompt' must be one text, and not empty", param="prompt")
    return prompt


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
