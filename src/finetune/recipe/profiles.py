"""Profiles: defaults for a kind of task. Whatever the recipe says itself wins."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "chat": {"template": {"name": "model"}, "train": {"max_length": 1024, "learning_rate": 2e-4}},
    "instruction": {"template": {"name": "alpaca"}, "train": {"max_length": 512, "learning_rate": 2e-4}},
    "code": {
        "template": {"name": "model"},
        "train": {"max_length": 2048, "learning_rate": 1e-4, "packing": True, "gradient_checkpointing": True},
    },
}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, mappings merged key by key; neither argument is changed."""
    merged = deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = deepcopy(value)
    return merged


def apply(mapping: dict[str, Any]) -> dict[str, Any]:
    """`mapping` over the defaults of the profile that it names; a section set to null stays null."""
    name = mapping.get("profile")
    return merge(PROFILES[name], mapping) if isinstance(name, str) and name in PROFILES else mapping
