"""Requests that no server could answer, each wrong in one place; and a whole one, with nearly every field there is."""

from __future__ import annotations

import json
from typing import Any

from support.door import HELLO

CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
HUGE = "1" + "0" * 400
WHOLE: dict[str, Any] = {
    "model": "town",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "found", "tool_call_id": "a"},
        {"role": "user", "content": "Hello"},
    ],
    "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 0.1, "frequency_penalty": -0.1,
    "stop": ["x"], "logit_bias": {"5": -100}, "stream": False, "stream_options": {"include_usage": True}, "n": 1,
    "logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}},
    "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": True, "top_k": 5,
    "min_p": 0.1, "repeat_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip


WRONG: dict[str, list[Any]] = {
    "text": [1, True, ["a"], {"a": 1}, 1.5, [], {}],
    "number": ["1", "", True, [1], {}, [], "nan", -1e308, 1e308, 10**30, -(10**30)],
    "whole": ["1", True, [1], {}, [], 1.5, 1e308, -1e308, 10**30, -(10**30), 2**40],
    "flag": [0, 1, "true", "", [], {}, 1.0],
    "object": [1, "x", "", [], [{}], True, 1.5],
    "list": [1, "x", {}, {"0": 1}, True, 1.5],
}
KINDS = {
    "messages": "list", "max_tokens": "whole", "max_completion_tokens": "whole", "seed": "whole", "temperature": "number",
    "top_p": "number", "presence_penalty": "number", "frequency_penalty": "number", "stream": "flag", "n": "whole",
    "stream_options": "object", "response_format": "object", "tools": "list", "parallel_tool_calls": "flag", "user": "text",
    "metadata": "object", "logit_bias": "object", "echo": "flag", "suffix": "text", "best_of": "whole", "store": "flag",
    "top_logprobs": "whole", "top_k": "whole", "min_p": "number", "repeat_penalty": "number", "n_predict": "whole",
    "repetition_penalty": "number", "mirostat": "whole", "cache_prompt": "flag", "grammar": "text", "json_schema": "object",
    "chat_template_kwargs": "object", "n_probs": "whole", "id_slot": "whole", "functions": "list", "modalities": "list",
    "reasoning_effort": "text", "service_tier": "text", "num_draft_tokens": "whole", "xtc_probability": "number",
}  # fmt: skip
TYPES = [(key, value) for key, kind in KINDS.items() for value in WRONG[kind]]
NESTED: list[tuple[str, Any]] = [
    ("stop", 5), ("stop", [1]), ("stop", [""]), ("stop", [["a"]]), ("stop", {}), ("stop", list("abcde")), ("stop", True),
    ("logit_bias", {"a": 1}), ("logit_bias", {"1": "x"}), ("logit_bias", {"1": 1e308}), ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": -100.5}), ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"-1": 1}), ("logit_bias", {"٣": 1}), ("logit_bias", {"1": True}), ("logit_bias", {"1": None}),
    ("tools", []), ("tools", [1]), ("tools", [{}]), ("tools", [{"type": "function"}]), ("tools", [{**TOOL, "type": "x"}]),
    ("tools", [{"type": "function", "function": {}}]), ("tools", [{"type": "function", "function": {"name": 1}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}]), ("tools", [None]), ("tools", ["look"]),
    ("tool_choice", "any"), ("tool_choice", ""), ("tool_choice", []), ("tool_choice", {}), ("tool_choice", 1),
    ("tool_choice", {"type": "function"}), ("tool_choice", {"type": "function", "function": "look"}),
    ("response_format", {}), ("response_format", {"type": "xml"}), ("response_format", {"type": 1}),
    ("response_format", {"type": "json_schema", "json_schema": "x"}), ("response_format", "json"),
    ("stream_options", {"include_usage": "yes"}), ("top_p", 0), ("logprobs", "yes"), ("logprobs", -1), ("logprobs", 10**9),
    ("reasoning_format", "x"), ("modalities", [1]), ("unheard_of", 1), ("", 1), ("\ud800", 1), ("adapters", "/etc"),
    ("chat_template_kwargs", {"a": "\udfff"}), ("metadata", {"\ud800": "a"}), ("user", "\ud83d"), ("stop", "\udc00"),
    ("metadata", {"a": float("inf")}), ("metadata", {"a": 10**40}), ("metadata", {"a": -(10**40)}),
    ("model", "\ud800"),
]  # fmt: skip


def with_message(**parts: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, {"role": "user", "content": "Hello", **parts}]}


def with_call(call: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call], **more}]}


def with_arguments(arguments: Any) -> dict[str, Any]:
    return with_call({**CALL, "function": {"name": "look", "arguments": arguments}})


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


MESSAGES: list[Any] = [
    {"messages": []}, {"messages": [None]}, {"messages": [[]]}, {"messages": ["Hello"]}, {"messages": [{}]}, {"messages": None},
    {"messages": [{"role": "user"}]}, {"messages": [{"content": "Hello"}]}, {}, {"messages": {"role": "user"}},
    {"messages": [1]},
    with_message(role="wizard"), with_message(role=None), with_message(role=1), with_message(role=["user"]),
    with_message(role={}),
    with_message(content=None), with_message(content=1), with_message(content={}), with_message(content=[]),
    with_message(content=[1]), with_message(content=[{}]), with_message(content=[{"type": "text"}]),
    with_message(content=["a"]),
    with_message(content=[{"type": "text", "text": 1}]), with_message(content=[{"type": "image_url", "image_url": {}}]),
    with_message(content=[{"text": "a"}]), with_message(content=True), with_message(content="\ud800"),
    with_message(content="a\udfffb"), with_message(content=[{"type": "text", "text": "\udc80"}]), with_message(name=1),
    with_message(name=["a"]), with_message(name="\ud800"), with_message(tool_call_id=5), with_message(reasoning_content=[]),
    with_message(tool_calls=[CALL]), with_message(other=nested(100)), with_message(other=float("inf")),
    {"messages": [{"role": "assistant", "content": None}]}, {"messages": [{"role": "assistant", "tool_calls": []}]},
    {"messages": [{"role": "assistant", "tool_calls": None}]}, {"messages": [{"role": "assistant", "tool_calls": "look"}]},
    {"messages": [{"role": "assistant", "content": 5, "tool_calls": [CALL]}]},
    {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]},
    *(with_call(call) for call in (None, 1, "look", [], {}, {"function": None}, {"function": "look"}, {"function": {}})),
    with_call({**CALL, "type": "wizard"}), with_call({**CALL, "id": 5}), with_call({**CALL, "id": []}),
    with_call({**CALL, "function": {"arguments": "{}"}}), with_call({**CALL, "function": {"name": 1, "arguments": "{}"}}),
    with_call({**CALL, "function": {"name": "", "arguments": "{}"}}), with_call({**CALL, "function": {"name": "look"}}),
    *map(with_arguments, (
        None, "", "x", "[]", "1", "null", "{", '{"a": }', [], 1, True, '{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}',
        '{"a": ' + HUGE + "}", "[" * 100_000, '{"a":' + "[" * 200 + "]" * 200 + "}", {"a": "\ud800"}, '"x"', "{'a': 1}",
    )),
]  # fmt: skip


BODIES: list[bytes] = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"x"', b"true", b"\xff\xfe\x00", b"\x00", b"{]", b"[" * 100_000, b"{}{}",
    b'{"messages": [' * 50_000, b'{"a":' * 50_000, json.dumps({"prompt": "Hello"}).encode("utf-16"), b"\xef\xbb\xbf{}",
    b'{"messages": "\xed\xa0\x80"}', b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}', b"{'messages': []}",
    b'{"messages": [{"role": "user", "content": "Hello"}], }', b'{"messages" [{"role": "user"}]}', b"messages=Hello",
    b'{"messages": [{"role": "user", "content": "Hello"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "Hello"}], "temperature": -Infinity}',
    b'{"messages": [{"role": "user", "content": "Hello"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "Hello"}], "user": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "Hello"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "Hello"}], "seed": ' + b"9" * 4000 + b"}",
    b'{"messages": [{"role": "user", "content": "Hello"}], "metadata": {"a": ' + b"9" * 400 + b"}}",
    b'{"messages": [{"role": "user", "content": "Hello"}], "metadata": {"a": 1e309}}',
    b'{"prompt": "Hello"', b'{"\\ud800": 1}', b"[" + b"0," * 500_000 + b"0]",
    b'{"metadata": {"a": [' + b"0," * 500_000 + b"0]}}",
    b'{"messages": [{"role": "user", "content": "Hello"}], "tools": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
]  # fmt: skip


PROMPTS: list[Any] = [None, "", 1, True, [], [""], [1], ["a", "b"], [[1]], {}, "\ud800", ["a\udfff"], nested(99)]
