"""Keys of a recipe under the names that they had before: each is read as the key of today, and a note is said.

The older configurations (`finetune.recipe.legacy`) are read by the same table, without a note: they are old as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.recipe.faults import Lines, place

UNTIL = "1.0"  # the version that refuses them
SHARE = "warmup_ratio"  # warmup_steps is a share below 1, and a number of steps from there on
OLDER = ("training", "alignment")  # sections of the older configurations


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A key's old name and its name now, in each of these sections; `whose` says who named it so."""

    sections: tuple[str, ...] = ("train", "align", *OLDER)
    old: str
    new: str
    whose: str


ALIASES = (
    Alias(old="max_seq_length", new="max_length", whose="TRL"),
    Alias(old="evaluation_strategy", new="eval_strategy", whose="transformers"),
    Alias(old=SHARE, new="warmup_steps", whose="transformers"),
    Alias(old="per_gpu_train_batch_size", new="per_device_train_batch_size", whose="transformers"),
    Alias(old="per_gpu_eval_batch_size", new="per_device_eval_batch_size", whose="transformers"),
    Alias(sections=("model",), old="torch_dtype", new="dtype", whose="transformers"),
    Alias(old="batch_size", new="per_device_train_batch_size", whose="older configurations"),
    Alias(old="eval_batch_size", new="per_device_eval_batch_size", whose="older configurations"),
    Alias(old="gradient_accumulation", new="gradient_accumulation_steps", whose="older configurations"),
    Alias(old="num_epochs", new="num_train_epochs", whose="older configurations"),
)
_BY_KEY: dict[tuple[str, ...], Alias] = {(section, alias.old): alias for alias in ALIASES for section in alias.sections}


def today(keys: tuple[str, ...]) -> tuple[str, ...]:
    """A dotted key, in parts, by the name that it has now."""
    alias = _BY_KEY.get(keys)
    return keys if alias is None else (keys[0], alias.new)


def apply(mapping: Mapping[str, Any], source: str, lines: Lines, faults: list[str]) -> dict[str, Any]:
    """A recipe's mapping with today's keys. `lines` gets the lines of the old ones for the new; `faults` one for every key
    that is given under both names, and for a value that means something else under the new one."""
    found = dict(mapping)
    for section, keys in mapping.items():
        if isinstance(keys, dict):
            found[section] = _section(section, keys, source, lines, faults)
    return found


def _section(section: str, keys: dict[str, Any], source: str, lines: Lines, faults: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in keys.items():
        (*_, new), where = today((section, key)), place(source, (section, key), lines)
        if new in given:
            faults.append(f"{where}: the same key as '{given[new]}', which is given too; leave one of the two out")
        given[new], found[new] = key, value
        if new != key:
            faults += check(section, key, value, where)
            if (section, key) in lines:
                lines.setdefault((section, new), lines[section, key])
    return found


def check(section: str, key: str, value: Any, where: str) -> list[str]:
    """Say that a key is an old name (given `where`); return a fault where its value means something else under the new."""
    if section not in OLDER:
        new = _BY_KEY[section, key].new
        warnings.warn(
            f"{where} is called {new} now; it will be refused from version {UNTIL}", FutureWarning, stacklevel=2
        )
    is_share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    if key == SHARE and not is_share:
        return [f"{where}: a share of all steps, from 0 to below 1, not {value!r}; a number of steps is 'warmup_steps'"]
    return []
