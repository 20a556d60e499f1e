"""The export formats: their names, variants, and where each is made. Nothing but names; see `finetune.export`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune.core.errors import UsageError
from finetune.core.lookup import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row. `default` is the variant meant where none is named; `backend` runs the export (None: the recipe's own);
    `extra` is what pip installs for it."""

    name: str
    module: str
    help: str
    variants: tuple[str, ...] = ()
    default: str = ""
    backend: str | None = None
    extra: str | None = None


GGUF_VARIANTS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0",
    "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_m", "q2_k",
)  # fmt: skip

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            name="gguf",
            module="finetune.export.gguf",
            help="One file for llama.cpp and what is built on it.",
            variants=GGUF_VARIANTS,
            default="f16",
            backend="llamacpp",
            extra="gguf",
        ),
        Format(
            name="mlx",
            module="finetune.export.mlx",
            help="A directory for Apple's MLX; in the training's own type, or converted.",
            variants=("f32", "f16", "bf16", "q8", "q4"),
            backend="mlx",
            extra="mlx",
        ),
        Format(
            name="ollama",
            module="finetune.export.ollama",
            help="A Modelfile beside its GGUF file, for `ollama create`.",
            variants=GGUF_VARIANTS,
            default="q8_0",
            backend="ollama",
            extra="gguf",
        ),
        Format(
            name="bundle",
            module="finetune.export.bundle",
            help="Weights, adapter, tokenizer, model card and checksums, ready for `hf upload`.",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format and its variant; `name` is as the user writes it, `folder` as it is called on disk."""

    format: Format
    variant: str

    @property
    def name(self) -> str:
        return f"{self.format.name}:{self.variant}" if self.variant else self.format.name

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-")


def parse(text: str) -> Target:
    """`gguf:q8_0` as a target. Raises UsageError with what is known."""
    name, _, variant = text.strip().lower().partition(":")
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(f"unknown export format '{name}'.{did_you_mean(name, FORMATS)} Known: {known}.")
    chosen = FORMATS[name]
    if variant and variant not in chosen.variants:
        if not chosen.variants:
            raise UsageError(f"the export format '{name}' has no variants; write '{name}', not '{text}'")
        known = ", ".join(f"{name}:{each}" for each in chosen.variants)
        raise UsageError(f"no variant '{variant}' of '{name}'.{did_you_mean(variant, chosen.variants)} Known: {known}.")
    return Target(format=chosen, variant=variant or chosen.default)


def targets(names: Iterable[str]) -> list[Target]:
    """The targets named, each once, in an order in which those that build on others come later."""
    found = {target.name: target for target in map(parse, names)}
    order = list(FORMATS)
    return sorted(found.values(), key=lambda target: order.index(target.format.name))
