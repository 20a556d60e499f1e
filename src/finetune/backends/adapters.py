"""What an adapter's configuration and the names of its tensors say, without the library that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "base_model.model."
_AS_THEY_WERE = (True, False, "gaussian")  # beginnings that leave the base's weights alone
_OTHER_KINDS = ("use_dora", "rank_pattern", "alpha_pattern")


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether LoRA of this configuration (PEFT's, or a recipe's) adds scale * B A to weights, with one scale for all."""
    return config.get("init_lora_weights", True) in _AS_THEY_WERE and not any(map(config.get, _OTHER_KINDS))


def own_names(tensors: Iterable[str]) -> dict[str, str]:
    """An adapter's tensors, by the names that they have in the model."""
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in tensors}


def weights(tensors: Iterable[str]) -> set[str] | None:
    """The model's weights that LoRA adds to; None where it adds to something else than linear weights."""
    names = own_names(tensors)
    added = {name for name in names if ".lora_" in name}
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in added):
        return None
    return {name.replace(".lora_A.", ".") for name in added if name.endswith(".lora_A.weight")}
