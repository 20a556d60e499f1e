"""What a request to an OpenAI-compatible server may say, checked before any server sees it: the same words for all.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.templates import with_system
from finetune.serving.fields import FIELDS, LARGEST, NAME, ROLES, TEXT, Kind, one_of

# Deeper, or of more parts, is no honest request; and what reads or renders it would run out of stack, or of time.
DEEPEST, MOST_PARTS = 64, 200_000
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
    message = f"there is no model '{_short(str(asked))}' here. This server has '{name}'; name it, or leave 'model' out"
    return Refused(message, status=404, param="model", code="model_not_found")


def checked(
    body: bytes, *, chat: bool, name: str, system: str | None = None, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The request in a body, with the model's name in it, its texts plain strings, and `system` first where a
    conversation has no system message. `ignored` are fields that the server would pass over in silence.

    Raises Refused.
    """
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise Refused(f"the body is not JSON: {_short(str(problem), 200)}") from None
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object, not {type(found).__name__}")
    given: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    _check_fields(given, ignored)
    for key, value in given.items():
        _check_values(value, key)
    if given.setdefault("model", name) != name:
        raise unknown_model(given["model"], name)
    if chat:
        messages = [_message(number, message) for number, message in enumerate(given.get("messages") or [])]
        if not messages:
            raise Refused("'messages' must be a list of at least one message", param="messages")
        given["messages"] = list(with_system(messages, system))
    else:
        given["prompt"] = _prompt(given)
    return given


def _check_fields(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    for key in FORBIDDEN:
        if key in given:
            raise Refused(f"'{key}' cannot be chosen by a request: this server has one model", param=key)
    for key, value in given.items():
        if key not in FIELDS:
            raise Refused(f"{_shown(key)} is not a field of a request to this server; leave it out", code="unsupported")
        _require(key, FIELDS[key], value)
    for key in ignored:
        if given.get(key) and given[key] != NEUTRAL.get(key):
            raise Refused(f"'{key}' is not supported by this server; leave it out", param=key, code="unsupported")
    for key in ("max_tokens", "max_completion_tokens"):
        if given.get(key, 0) > LARGEST:
            raise Refused(f"'{key}' must be a whole number of {LARGEST} or less", param=key)
    if given.get("top_p") == 0:
        raise Refused("'top_p' must be above 0; for the likeliest token set 'temperature' to 0", param="top_p")


def _require(where: str, kind: Kind, value: Any) -> None:
    if not kind.fits(value):
        raise Refused(f"'{where}' must be {kind.words}, not {_shown(value)}", param=where)


def _check_values(value: Any, where: str) -> None:
    """Refuse what JSON's grammar lets through and no server can work with, however deep in a field it is."""
    left, seen = [(value, 1)], 0
    while left:
        part, depth = left.pop()
        seen += 1
        wrong = None
        if isinstance(part, str):
            wrong = None if _is_unicode(part) else "a lone surrogate, which is no text"
        elif isinstance(part, float):
            wrong = None if math.isfinite(part) else f"{_shown(part)}, which is no number"
        elif isinstance(part, int):
            wrong = None if -(2**63) <= part < 2**64 else "a whole number of more than 64 bits"
        elif part is not None and depth > DEEPEST:
            wrong = f"lists and objects nested more than {DEEPEST} deep"
        elif part is not None and seen + len(left) + len(part) > MOST_PARTS:
            wrong = f"more than {MOST_PARTS} values"
        elif part is not None:
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            left += [(each, depth + 1) for each in inner]
        if wrong:
            raise Refused(f"'{where}' holds {wrong}", param=where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _message(number: int, message: Any) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Refused(f"'{where}' must be an object with 'role' and 'content'", param=where)
    message = {key: value for key, value in message.items() if value is not None}
    _require(f"{where}.role", one_of(*ROLES), message.get("role"))
    for key in ("name", "tool_call_id", "reasoning_content", "refusal"):
        if key in message:
            _require(f"{where}.{key}", TEXT, message[key])
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message, f"{where}.tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str) and not (content is None and "content" not in message and "tool_calls" in message):
        raise Refused(
            f"'{where}.content' must be a text, or a list of parts of the type 'text'", param=f"{where}.content"
        )
    return {**message, "content": content or ""}


def _tool_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """An assistant's calls; their arguments are JSON written as a text, or in the words of some clients the object itself."""
    calls = message["tool_calls"]
    if message["role"] != "assistant" or not isinstance(calls, list) or not calls:
        raise Refused(f"'{where}' must be a list of at least one call, in a message of an assistant", param=where)
    return [_tool_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Refused(f"'{where}' must be an object with 'function', an object", param=where)
    _require(f"{where}.type", one_of("function"), call.get("type", "function"))
    _require(f"{where}.function.name", NAME, function.get("name"))
    if call.get("id") is not None:
        _require(f"{where}.id", TEXT, call["id"])
    param = f"{where}.function.arguments"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise Refused(f"'{param}' must be a JSON object written as a text, such as \"{{}}\"", param=param)
    _check_values(arguments, param)
    return {key: value for key, value in call.items() if value is not None}


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused("'prompt' must be one text, and not empty", param="prompt")
    return prompt


def _shown(value: Any) -> str:
    try:
        return _short(json.dumps(value))
    except (ValueError, RecursionError):  # nested deeper than can be written down
        return f"a {type(value).__name__} that is nested too deep"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
