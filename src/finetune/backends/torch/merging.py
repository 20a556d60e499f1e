"""Base plus adapter as one model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import safe_open

from finetune.backends import adapters
from finetune.backends.torch import quantizers
from finetune.backends.torch.loading import load_adapter, load_model
from finetune.backends.torch.tokenizer import HFTokenizer, stored_tokenizer
from finetune.core.files import aside


def merge(model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
    """Write base + adapter to `out` with the adapter's tokenizer (it carries the training's chat template), made to stop
    at the tokenizer's end-of-turn token too: `generate` looks for it in the generation settings alone.

    NaN and infinity are merged as they are: it is for the checks to refuse what was trained. `out` appears whole or not at
    all.
    """
    base, quantizer = load_model(model, {**settings, "device": "cpu"}), quantizers.chosen(settings)
    if quantizer is not None:  # PEFT would round base and adapter to four bits again
        base = quantizer.dequantized(base)
    merged = load_adapter(base, adapter).merge_and_unload()
    source = adapter if (adapter / "tokenizer_config.json").is_file() else model
    trust = bool(settings.get("trust_remote_code"))
    ends = [*HFTokenizer(model, trust_remote_code=trust).eos_ids]
    merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    with aside(out) as partial:
        merged.save_pretrained(str(partial))
        stored_tokenizer(source, trust_remote_code=trust).save_pretrained(str(partial))
    return out


PROBED = 8  # modules that the factor is measured on
# What half a step in the last place is, relative to a number, by the type that it is stored in.
ROUNDING = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Three times the worst of 36 sound merges (six adapters, base and result in three types each), which was 0.64.
ROUNDINGS = 2.0


def factor(model: Path, adapter: Path, merged: Path, **settings: Any) -> float | None:
    """How often the adapter is in the merged weights: the k in merged = base + k * scale * B A, by least squares.

    1 for a sound merge, 0 for none, 2 for one done twice. None for adapters that are no plain LoRA (DoRA, PiSSA, others);
    NaN where base, adapter or result hold NaN, or the adapter adds nothing.
    """
    lora = _Lora.read(adapter)
    before, after = _Base(model, settings), _Stored(merged)
    if lora is None or not lora.weights or not lora.weights <= before.files.keys() & after.files.keys():
        return None
    found = []
    for name in sorted(lora.weights)[:PROBED]:
        moved = after.read(name) - before.read(name)
        delta = lora.delta(name)
        size = float((delta * delta).sum())
        if size != 0:  # NaN is kept
            found.append(float((moved * delta).sum()) / size)
    return math.nan if not found or any(map(math.isnan, found)) else median(found)


def exactness(model: Path, adapter: Path, merged: Path, **settings: Any) -> dict[str, Any] | None:
    """Whether each merged weight is what base and adapter make of it: `compared`, `off` (name, and how many roundings it is
    away, root mean square; None: it stands in one of the two alone) and `worst` of the others. None as for `factor`."""
    lora = _Lora.read(adapter)
    before, after = _Base(model, settings).tie(), _Stored(merged)
    if lora is None or not lora.weights <= before.files.keys():
        return None
    # What only the base has is no weight of the model (a stored mask, a head that is the embedding): it would not load.
    names = after.files.keys() | lora.weights
    there = after.files.keys() & (before.files.keys() | lora.replaced.keys())
    errors = {name: _error(lora, before, after, name) for name in sorted(there)}
    off: list[dict[str, Any]] = [{"name": name, "roundings": None} for name in sorted(names - there)]
    off += [{"name": name, "roundings": error} for name, error in errors.items() if not error <= ROUNDINGS]
    return {
        "compared": len(names),
        "off": off,
        "worst": max((error for error in errors.values() if error <= ROUNDINGS), default=0.0),
    }


def _error(lora: _Lora, before: _Stored, after: _Stored, name: str) -> float:
    """How many roundings a merged weight is from what it should be."""
    found = after.read(name)
    wanted = lora.tensors.read(lora.replaced[name]) if name in lora.replaced else before.read(name)
    if name in lora.weights:
        wanted = wanted + lora.delta(name)
    if found.shape != wanted.shape:
        return math.inf
    size = float(wanted.square().mean().sqrt()) or 1.0
    return float((found - wanted).square().mean().sqrt()) / size / ROUNDING.get(after.dtype(name), ROUNDING["F32"])


class _Lora:
    """A plain LoRA adapter: `weights` are the names of those that it adds to, `replaced` those that it holds whole, by the
    names they have in the model."""

    def __init__(self, tensors: _Stored, weights: set[str], scale: float, *, inputs_first: bool) -> None:
        self.tensors, self.weights, self.scale, self.inputs_first = tensors, weights, scale, inputs_first
        own = adapters.own_names(tensors.files)
        self.replaced = {name: stored for name, stored in own.items() if ".lora_" not in name}

    @classmethod
    def read(cls, adapter: Path) -> _Lora | None:
        """None for an adapter that adds something else than scale * B A to linear weights."""
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = _Stored(adapter)
        weights = adapters.weights(tensors.files)
        if weights is None or not adapters.is_plain(config):
            return None
        rank = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(tensors, weights, scale, inputs_first=bool(config.get("fan_in_fan_out")))

    def delta(self, name: str) -> Any:
        """What is added to a weight; GPT-2 stores its weights the other way round."""
        stem = adapters.PREFIX + name.removesuffix(".weight")
        found = self.scale * (self.tensors.read(f"{stem}.lora_B.weight") @ self.tensors.read(f"{stem}.lora_A.weight"))
        return found.T if self.inputs_first else found


class _Stored:
    """The tensors in a directory's safetensors files, read one by one as float32. `files` are their files and names there,
    by the names of a model in which the output head may be the embedding."""

    def __init__(self, directory: Path) -> None:
        self.files: dict[str, tuple[Path, str]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as stored:
                self.files |= {name: (file, name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)

    def tie(self) -> _Stored:
        """With the embedding as output head, where none is stored."""
        embedding = next((name for name in self.files if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
        if embedding:
            self.files.setdefault("lm_head.weight", self.files[embedding])
        return self

    def read(self, name: str) -> Any:
        file, own = self.files[name]
        with safe_open(str(file), framework="pt") as stored:
            return stored.get_tensor(own).float()

    def dtype(self, name: str) -> str:
        file, own = self.files[name]
        with safe_open(str(file), framework="pt") as stored:
            return str(stored.get_slice(own).get_dtype())


@lru_cache(maxsize=1)
def _held(directory: Path, quantization: str, trusted: bool) -> frozenset[str]:
    """The names of the weights that a quantizer holds of a base, which has to be loaded for it."""
    settings = {"quantization": quantization, "trust_remote_code": trusted, "device": "cpu"}
    quantizer = quantizers.chosen(settings)
    return frozenset(quantizer.names(load_model(directory, settings)) if quantizer else ())


class _Base(_Stored):
    """A base as `settings` load it: the weights that a quantizer holds are the numbers that they come to."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(directory)
        self.quantizer = quantizers.chosen(settings)
        trusted = bool(settings.get("trust_remote_code"))
        self.held = _held(directory, settings["quantization"], trusted) if self.quantizer else frozenset()

    def read(self, name: str) -> Any:
        found = super().read(name)
        return self.quantizer.rounded(found) if self.quantizer and name in self.held else found
