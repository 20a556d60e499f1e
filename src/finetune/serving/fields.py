"""What each field of a request may be: OpenAI's, and those that llama.cpp's and mlx-lm's servers have besides.

https://platform.openai.com/docs/api-reference/chat and .../completions; llama.cpp's tools/server/README.md; mlx-lm's SERVER.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

STOPS = 4
SEEDS = 2**32
LARGEST = 2**31 - 1  # servers count in 32 bits; in C++, what is beyond is anything
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Kind:
    """`'field' must be WORDS`, and the test of it."""

    words: str
    fits: Callable[[Any], bool]


def number(at_least: float = -LARGEST, at_most: float = LARGEST, *, whole: bool = False) -> Kind:
    kind = "a whole number" if whole else "a number"
    return Kind(f"{kind} from {at_least} to {at_most}", lambda value: _is_number(value, at_least, at_most, whole))


def count(at_least: int) -> Kind:
    """Its greatest value is told apart (`LARGEST`): nobody who asks for too little wants to read of it."""
    return Kind(f"a whole number of {at_least} or more", lambda value: _is_number(value, at_least, math.inf, True))


def _is_number(value: Any, at_least: float, at_most: float, whole: bool) -> bool:
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    return right and at_least <= value <= at_most


def one_of(*known: str) -> Kind:
    return Kind(f"one of {', '.join(known)}", lambda value: value in known)


def record(fields: Mapping[str, Kind], *needed: str) -> Kind:
    """An object whose fields are of these kinds where they are there; others are left alone."""
    words = ", ".join(f"'{name}' ({kind.words})" for name, kind in fields.items())
    return Kind(
        f"an object with {words}",
        lambda value: (
            isinstance(value, dict)
            and all(value.get(name) is not None for name in needed)
            and all(kind.fits(value[name]) for name, kind in fields.items() if value.get(name) is not None)
        ),
    )


def several(kind: Kind) -> Kind:
    return Kind(
        f"a list of at least one: {kind.words}",
        lambda value: isinstance(value, list) and bool(value) and all(kind.fits(each) for each in value),
    )


def either(first: Kind, second: Kind) -> Kind:
    return Kind(f"{first.words}, or {second.words}", lambda value: first.fits(value) or second.fits(value))


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= STOPS and all(isinstance(each, str) and each for each in texts)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        token.isascii()
        and token.isdecimal()
        and len(token) <= len(str(LARGEST))
        and type(bias) in (int, float)
        and -100 <= bias <= 100
        for token, bias in value.items()
    )


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAME = Kind("a text that is not empty", lambda value: isinstance(value, str) and bool(value))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
STOP = Kind(f"a text, or a list of up to {STOPS} texts, none of them empty", _is_stop)
BIAS = Kind("an object from ids of tokens to numbers from -100 to 100", _is_bias)
SHARE, PENALTY = number(0, 1), number(-2, 2)
FUNCTION = record({"name": NAME, "description": TEXT, "parameters": OBJECT, "strict": FLAG}, "name")
TOOL = record({"type": one_of("function"), "function": FUNCTION}, "type", "function")
CHOSEN = record({"type": one_of("function"), "function": record({"name": NAME}, "name")}, "type", "function")
FORMAT = record({"type": one_of("text", "json_object", "json_schema"), "json_schema": OBJECT, "schema": OBJECT}, "type")

OPENAI: dict[str, Kind] = {
    "model": Kind("this server's model", lambda value: True),  # another is not a fault in writing: it is not found
    "messages": Kind("a list of at least one message", lambda value: isinstance(value, list) and bool(value)),
    "prompt": Kind("one text, and not empty", lambda value: True),  # looked at where it is asked for
    "max_tokens": count(1),
    "max_completion_tokens": count(1),
    "seed": number(0, SEEDS - 1, whole=True),
    "temperature": number(0, 2),
    "top_p": SHARE,
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "stop": STOP,
    "logit_bias": BIAS,
    "stream": FLAG,
    "stream_options": record({"include_usage": FLAG, "include_obfuscation": FLAG}),
    "n": number(1, 128, whole=True),
    "best_of": number(1, 128, whole=True),
    "echo": FLAG,
    "suffix": TEXT,
    "logprobs": either(FLAG, number(0, 20, whole=True)),
    "top_logprobs": number(0, 20, whole=True),
    "response_format": FORMAT,
    "tools": several(TOOL),
    "tool_choice": either(one_of("none", "auto", "required"), CHOSEN),
    "parallel_tool_calls": FLAG,
    "functions": several(FUNCTION),
    "function_call": either(one_of("none", "auto"), record({"name": NAME}, "name")),
    # They change nothing that a model says here, and are passed on as they are.
    **dict.fromkeys(
        ("metadata", "audio", "prediction", "web_search_options", "prompt_cache_options", "moderation"), OBJECT
    ),
    **dict.fromkeys(("user", "service_tier", "reasoning_effort", "verbosity", "safety_identifier"), TEXT),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), TEXT),
    "modalities": TEXTS,
    "store": FLAG,
}
SHARED: dict[str, Kind] = {"top_k": number(whole=True), "min_p": SHARE, "chat_template_kwargs": OBJECT}
SHARED |= dict.fromkeys(("xtc_probability", "xtc_threshold"), SHARE)
MLX: dict[str, Kind] = {"repetition_penalty": number(0), "num_draft_tokens": number(0, whole=True)}
MLX |= dict.fromkeys(
    ("repetition_context_size", "presence_context_size", "frequency_context_size"), number(0, whole=True)
)
LLAMACPP: dict[str, Kind] = {
    **dict.fromkeys(
        ("typical_p", "top_n_sigma", "repeat_penalty", "mirostat_tau", "mirostat_eta", "dynatemp_range"), number()
    ),
    **dict.fromkeys(("dynatemp_exponent", "dry_multiplier", "dry_base", "adaptive_target", "adaptive_decay"), number()),
    **dict.fromkeys(("mirostat", "n_predict", "n_keep", "n_discard", "n_indent", "n_cmpl"), number(whole=True)),
    **dict.fromkeys(("repeat_last_n", "dry_allowed_length", "dry_penalty_last_n"), number(whole=True)),
    **dict.fromkeys(("n_probs", "min_keep", "id_slot", "t_max_predict_ms"), number(whole=True)),
    **dict.fromkeys(("ignore_eos", "cache_prompt", "return_tokens", "timings_per_token", "return_progress"), FLAG),
    **dict.fromkeys(("post_sampling_probs", "add_generation_prompt", "parse_tool_calls", "verbose"), FLAG),
    "backend_sampling": FLAG,
    "reasoning_format": one_of("none", "auto", "deepseek", "deepseek-legacy"),
    "reasoning_budget": number(whole=True),
    "samplers": either(TEXT, TEXTS),
    **dict.fromkeys(("dry_sequence_breakers", "response_fields"), TEXTS),
    "grammar": TEXT,
    "json_schema": OBJECT,
    "lora": LIST,
}
EXTRAS: dict[str, Kind] = {**SHARED, **MLX, **LLAMACPP}
FIELDS: dict[str, Kind] = {**OPENAI, **EXTRAS}
