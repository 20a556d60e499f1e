"""Merged models in the formats that people run: one module a format, one row in the table (`recipe.exports`).

A module has two functions. `rehearse(model, variant)` raises what would go wrong with a model directory, before any
training. `export(source, variant, out)` writes into the empty directory `out` and returns what it wrote. Code that comes
with the model runs in neither unless it is trusted (`trust_remote_code`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from finetune.recipe.exports import FORMATS, GGUF_VARIANTS, Format, Target, parse, targets

__all__ = [
    "FORMATS", "GGUF_VARIANTS", "Exported", "Exporter", "Format", "Source", "Target", "exporter", "parse", "targets",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported. `model` is the merged model's directory; `adapter` and `base` what it was merged from, where
    there was an adapter; `system` the recipe's own system message; `license` an SPDX id or None, `license_text` the
    licence's words; `done` the exports finished before this one, by name; `card` facts for the model card."""

    name: str
    model: Path
    base: Path | None = None
    adapter: Path | None = None
    system: str | None = None
    license: str | None = None
    license_text: str | None = None
    trust_remote_code: bool = False
    done: Mapping[str, Path] = field(default_factory=dict)
    card: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `path` is what the runtime loads (inside `out`); `mended` says in one sentence each what was
    written differently because the runtime reads it differently."""

    path: Path
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """What a format's module offers."""

    def rehearse(self, model: Path, variant: str, *, trust_remote_code: bool = False) -> None: ...

    def export(self, source: Source, variant: str, out: Path) -> Exported: ...


def exporter(target: Target) -> Exporter:
    """The module of a target's format; what is heavy in it is imported when its functions are called."""
    module: Any = import_module(target.format.module)
    return module  # type: ignore[no-any-return]
