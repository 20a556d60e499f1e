"""The quantizers: base models held in fewer bits while an adapter trains on top (QLoRA, https://arxiv.org/abs/2305.14314).

A row is all that is known of one without loading it. What carries it out is a module of the backend by the row's name
(`finetune.backends.torch.quantizers.nf4`), or `module`, for a row of another package (entry point `finetune.quantizer`).
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.core.lookup import row

OWN = "finetune.backends.torch.quantizers.{}"


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One row. `bits` is what a quantized weight takes, its share of the scales included; `methods` are what trains on top,
    `initial` the ways in which LoRA may begin there (None: any that leaves the base as it is); `extra` brings its package."""

    name: str
    help: str
    bits: float
    backends: tuple[str, ...]
    devices: tuple[str, ...]
    extra: str
    methods: tuple[str, ...] = ("lora",)
    initial: tuple[bool | str, ...] = (True, False, "gaussian")
    module: str = ""

    @property
    def reference(self) -> str:
        """The module that carries it out."""
        return self.module or OWN.format(self.name)


QUANTIZERS: dict[str, Quantizer] = {
    each.name: each
    for each in (
        Quantizer(
            name="nf4",
            help="bitsandbytes' 4-bit NormalFloat, a float32 scale for each 64 weights.",
            bits=4 + 32 / 64,
            backends=("torch",),
            devices=("cpu", "cuda"),
            extra="bitsandbytes",
        ),
    )
}


def quantizer(name: str) -> Quantizer:
    """The row of that name. Raises UsageError with the known names."""
    found: Quantizer = row("quantizer", name, QUANTIZERS)
    return found
